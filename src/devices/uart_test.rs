//! The serial port as a driver meets it, kind and hostile.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::testing::event_fd;

const IER: u8 = 1;
const IIR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const IER_RDI: u8 = 1;

fn port() -> (Uart, ConsoleSink, Arc<EventFd>) {
    let sink = ConsoleSink::new(None);
    let line = event_fd();
    let uart = Uart::new(sink.clone(), Interrupt::new(Arc::clone(&line)));
    (uart, sink, line)
}

#[test]
fn output_goes_to_the_sink_and_the_transmitter_is_empty_again() {
    let (mut uart, sink, _line) = port();
    for byte in b"early\n" {
        assert_eq!(uart.read(LSR) & 0x60, 0x60);
        uart.write(DATA, *byte);
    }
    assert_eq!(sink.tail(10), "early\n");
}

#[test]
fn input_longer_than_the_fifo_arrives_whole() {
    let (mut uart, _sink, line) = port();
    uart.write(IER, IER_RDI);
    let typed: Vec<u8> = (0..200).collect();
    uart.input(&typed);
    assert!(line.read().is_ok());
    let mut got = Vec::new();
    while uart.read(LSR) & 1 != 0 {
        got.push(uart.read(DATA));
    }
    assert_eq!(got, typed);
}

#[test]
fn a_flood_both_ways_stays_bounded() {
    let (mut uart, sink, _line) = port();
    for _ in 0..100 {
        uart.input(&[b'i'; 10_000]);
    }
    let state = uart.save();
    assert!(state.fifo.len() <= 64 && state.input.len() <= MAX_INPUT);
    for _ in 0..100_000 {
        uart.write(DATA, b'o');
    }
    assert_eq!(sink.total_bytes(), 100_000);
    // Looped back, the port floods itself.
    uart.write(MCR, 1 << 4);
    for _ in 0..100_000 {
        uart.write(DATA, b'l');
    }
    uart.input(&[b'i'; 10_000]);
    let state = uart.save();
    assert!(state.fifo.len() <= 64 && state.input.len() <= MAX_INPUT);
    assert_eq!(sink.total_bytes(), 100_000);
}

#[test]
fn every_value_in_every_register_is_taken() {
    let (mut uart, _sink, _line) = port();
    for offset in 0..=u8::MAX {
        for value in 0..=u8::MAX {
            uart.write(offset, value);
            uart.read(offset);
            uart.input(&[value]);
        }
    }
    let state = uart.save();
    port().0.restore(state).unwrap();
}

#[test]
fn a_sink_without_a_reader_does_not_stop_the_port() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let writer = std::fs::File::from(std::os::fd::OwnedFd::from(writer));
    let sink = ConsoleSink::new(Some(writer));
    let mut uart = Uart::new(sink.clone(), Interrupt::none());
    uart.write(DATA, b'a');
    uart.write(DATA, b'b');
    assert_eq!(sink.tail(2), "ab");
}

#[test]
fn a_restored_port_has_the_same_registers_and_input() {
    let (mut uart, _sink, _line) = port();
    uart.write(LCR, 0x80);
    uart.write(DATA, 0x55);
    uart.write(LCR, 0x1b);
    uart.write(7, 0xa5);
    uart.input(&[9; 100]);
    let state = uart.save();
    let stored = serde_json::to_string(&state).unwrap();
    let (mut clone, sink, _line) = port();
    clone
        .restore(serde_json::from_str(&stored).unwrap())
        .unwrap();
    assert_eq!(clone.save(), state);
    clone.write(DATA, b'x');
    assert_eq!(sink.tail(1), "x", "output goes to the clone's own sink");
}

#[test]
fn a_driver_that_waits_to_send_on_is_woken_after_a_restore() {
    let (mut uart, _sink, line) = port();
    uart.write(IER, IER_THRI);
    uart.write(DATA, b'x');
    assert!(line.read().is_ok());
    // The driver has seen the interrupt but not yet acted on it.
    uart.read(IIR);
    let (mut clone, _sink, line) = port();
    clone.restore(uart.save()).unwrap();
    assert!(line.read().is_ok(), "interrupted again");
    assert_eq!(clone.read(IIR) & 0x0f, IIR_THRI);
}

#[test]
fn a_driver_that_waits_for_nothing_is_not_woken_after_a_restore() {
    let (mut uart, _sink, _line) = port();
    uart.write(DATA, b'x');
    let (mut clone, _sink, line) = port();
    clone.restore(uart.save()).unwrap();
    assert!(line.read().is_err());
    assert_eq!(clone.read(IIR) & 0x0f, IIR_NONE);
}

#[test]
fn states_with_too_much_input_are_refused() {
    let good = port().0.save();
    let fifo = UartState {
        fifo: vec![0; 65],
        ..good.clone()
    };
    let input = UartState {
        input: vec![0; MAX_INPUT + 1],
        ..good
    };
    assert!(port().0.restore(fifo).is_err());
    assert!(port().0.restore(input).is_err());
}
