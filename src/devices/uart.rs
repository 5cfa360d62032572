//! The 16550 serial port, for output before virtio and for kernels without it.
//!
//! Lives on the bus behind its lock; a vCPU's port access calls it. Every register may be written
//! with anything. Output goes to the console's sink at once, so the transmitter is always empty.
//! Input waits in the port's FIFO and in a bounded queue before it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use super::console::ConsoleSink;
use super::{HostFault, Interrupt};

/// Typed bytes kept beside the FIFO for a guest that does not read; more are dropped.
const MAX_INPUT: usize = 4096;
/// The offset of the receive buffer.
const DATA: u8 = 0;
/// IER: interrupt when the transmitter holding register is empty.
const IER_THRI: u8 = 1 << 1;
/// IIR: nothing pending.
const IIR_NONE: u8 = 1 << 0;
/// IIR: the transmitter holding register is empty.
const IIR_THRI: u8 = 1 << 1;

/// A serial port.
#[derive(Debug)]
pub struct Uart {
    serial: Serial<Line, NoEvents, Out>,
    input: VecDeque<u8>,
}

/// A serial port's state as a snapshot stores it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    input: Vec<u8>,
}

#[derive(Debug)]
struct Line(Interrupt);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.signal();
        Ok(())
    }
}

#[derive(Debug)]
struct Out(ConsoleSink);

impl io::Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Uart {
    /// A port after reset.
    pub fn new(sink: ConsoleSink, interrupt: Interrupt) -> Self {
        Self {
            serial: Serial::new(Line(interrupt), Out(sink)),
            input: VecDeque::new(),
        }
    }

    /// A read of the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.serial.read(offset);
        if offset == DATA {
            self.refill();
        }
        value
    }

    /// A write of the register at `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        // Neither the line nor the sink can fail.
        let _infallible = self.serial.write(offset, value);
    }

    /// Bytes typed by the operator; what the guest does not read in time is dropped.
    pub fn input(&mut self, bytes: &[u8]) {
        let room = MAX_INPUT.saturating_sub(self.input.len());
        self.input.extend(bytes.iter().take(room));
        self.refill();
    }

    pub fn save(&self) -> UartState {
        let serial = self.serial.state();
        UartState {
            divisor_low: serial.baud_divisor_low,
            divisor_high: serial.baud_divisor_high,
            interrupt_enable: serial.interrupt_enable,
            interrupt_identification: serial.interrupt_identification,
            line_control: serial.line_control,
            line_status: serial.line_status,
            modem_control: serial.modem_control,
            modem_status: serial.modem_status,
            scratch: serial.scratch,
            fifo: serial.in_buffer,
            input: self.input.iter().copied().collect(),
        }
    }

    /// Takes over a saved state.
    pub fn restore(&mut self, state: UartState) -> Result<(), HostFault> {
        let mut pending = state.interrupt_identification;
        // A driver that enabled this interrupt waits for it to go on sending, and an edge that
        // was raised before the snapshot is lost. The transmitter is empty, so it is due.
        if state.interrupt_enable & IER_THRI != 0 {
            pending = (pending & !IIR_NONE) | IIR_THRI;
        }
        let serial = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: pending,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo,
        };
        if state.input.len() > MAX_INPUT {
            return Err(HostFault::msg("saved serial port holds too much input"));
        }
        let line = Line(self.serial.interrupt_evt().0.clone());
        let out = Out(self.serial.writer().0.clone());
        self.serial = Serial::from_state(&serial, line, NoEvents, out)
            .map_err(|_fifo| HostFault::msg("saved serial port holds too much input"))?;
        self.input = state.input.into();
        Ok(())
    }

    /// Moves waiting bytes into the FIFO, which raises the interrupt.
    fn refill(&mut self) {
        let room = self.serial.fifo_capacity().min(self.input.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.input.iter().take(room).copied().collect();
        // In loop-back mode it takes none: they stay.
        let taken = self.serial.enqueue_raw_bytes(&bytes).unwrap_or(0);
        self.input.drain(..taken);
    }
}

#[cfg(test)]
#[path = "uart_test.rs"]
mod tests;
