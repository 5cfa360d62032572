//! What the network tests share: a guest that drives a NIC, and the host's side of its TAP.
#![expect(unsafe_code, reason = "TUNSETIFF and packet sockets have no safe form")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::super::*;
use crate::devices::testing::{NEXT, Ring, WRITE, event_fd, memory};
use crate::devices::{GuestMemory, Interrupt};
use crate::testing::run;

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// An EtherType for experiments: nothing else on the wire has it.
pub const OURS: [u8; 2] = [0x88, 0xb5];
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PLAIN: u64 = VERSION_1 | (1 << VIRTIO_NET_F_MRG_RXBUF);
pub const EVERYTHING: u64 = VERSION_1 | EVENT_IDX | (1 << 28) | FEATURES;
const RX_BUFFER: u32 = 1536;
const PATIENCE: Duration = Duration::from_secs(20);

/// A TAP named `t0` in this thread's namespace, up, that sends nothing by itself.
pub fn tap() -> OwnedFd {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .expect("TAPs (run as root)");
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = libc::c_char::from_ne_bytes([b't']);
    request.ifr_name[1] = libc::c_char::from_ne_bytes([b'0']);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    // SAFETY: the kernel reads and writes one ifreq, which lives across the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, &raw mut request) };
    assert_eq!(made, 0, "TUNSETIFF: {}", io::Error::last_os_error());
    let size: libc::c_int = 12;
    // SAFETY: the kernel reads one int, which lives across the call.
    let sized = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54d8, &raw const size) };
    assert_eq!(sized, 0, "TUNSETVNETHDRSZ: {}", io::Error::last_os_error());
    run("ip link set dev t0 addrgenmode none");
    run("ip link set dev t0 up");
    file.into()
}

/// The host's side of the TAP: whole frames with the kernel's vnet header of 10 bytes.
pub struct Wire(File);

impl Wire {
    pub fn new() -> Self {
        // SAFETY: creates a descriptor; no memory is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: the descriptor was just made and has no other owner.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let set = |level, name, value: &[u8]| {
            let len = libc::socklen_t::try_from(value.len()).unwrap();
            // SAFETY: the kernel reads `len` bytes of `value`.
            let set = unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), len) };
            assert_eq!(set, 0, "setsockopt: {}", io::Error::last_os_error());
        };
        set(
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            &1_i32.to_ne_bytes(),
        );
        let timeout: Vec<u8> = [PATIENCE.as_secs(), 0]
            .iter()
            .flat_map(|n| n.to_ne_bytes())
            .collect();
        set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout);
        // SAFETY: an all-zero sockaddr_ll is a valid value of this plain C struct.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
        // SAFETY: the name is a C string.
        address.sll_ifindex = unsafe { libc::if_nametoindex(c"t0".as_ptr()) }.cast_signed();
        let len = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
        // SAFETY: the kernel reads one sockaddr_ll, which lives across the call.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
        Self(file)
    }

    /// Sends a frame to the guest.
    pub fn send(&mut self, header: [u8; 10], frame: &[u8]) {
        let sent = self.0.write(&[&header[..], frame].concat()).unwrap();
        assert_eq!(sent, header.len() + frame.len());
    }

    /// The next frame of the guest with this EtherType.
    pub fn receive(&mut self, ether_type: [u8; 2]) -> ([u8; 10], Vec<u8>) {
        loop {
            let mut bytes = vec![0; 70_000];
            let len = self.0.read(&mut bytes).expect("a frame from the guest");
            bytes.truncate(len);
            let frame = bytes.split_off(10);
            // Our own frames to the guest pass here too.
            if frame[12..14] == ether_type && frame[6..12] == MAC {
                return (bytes.try_into().unwrap(), frame);
            }
        }
    }
}

/// A frame from the guest (or to it) with `payload`.
pub fn frame(from_guest: bool, payload: &[u8]) -> Vec<u8> {
    let host = [2, 0, 0, 0, 0, 1];
    let (to, from) = if from_guest { (host, MAC) } else { (MAC, host) };
    [&to[..], &from[..], &OURS[..], payload].concat()
}

/// A TCP segment over IPv4 of `payload` bytes, its checksum still to do, and the header for it.
pub fn tcp_segment(from_guest: bool, payload: usize) -> ([u8; 12], Vec<u8>) {
    let mut frame = frame(from_guest, &[]);
    frame[12..14].copy_from_slice(&[8, 0]);
    let total = u16::try_from(20 + 20 + payload).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    let sum = !fold(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // The pseudo header's sum, which whoever finishes the checksum starts from.
    let mut pseudo = ip[12..20].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend((total - 20).to_be_bytes());
    let mut tcp = vec![
        0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ];
    tcp[16..18].copy_from_slice(&fold(&pseudo).to_be_bytes());
    frame.extend(ip);
    frame.extend(tcp);
    frame.extend((0..payload).map(|i| u8::try_from(i % 251).unwrap()));
    // NEEDS_CSUM, TCPV4, hdr_len 54, gso_size 1448, csum_start 34, csum_offset 16.
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], frame)
}

/// The internet checksum's sum, not inverted.
pub fn fold(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// A guest and its NIC, served by the caller's thread.
pub struct Guest {
    pub nic: Net,
    pub rx: Ring,
    pub tx: Ring,
    pub config_call: Arc<EventFd>,
    pub features: u64,
    pub mem: GuestMemory,
    /// Used entries seen, receive and transmit: where the next interrupt is wanted.
    seen: [u16; 2],
    epoll: Epoll,
}

impl Guest {
    /// A NIC on `tap` whose driver took `features` and offers `buffers` receive buffers.
    pub fn boot(tap: OwnedFd, features: u64, vhost: bool, buffers: u16) -> Self {
        let nic = Net::new(NetConfig {
            tap,
            mac: MAC,
            mtu: 1500,
            link_up: true,
            vhost,
        })
        .unwrap();
        Self::with(nic, features, buffers)
    }

    pub fn with(nic: Net, features: u64, buffers: u16) -> Self {
        let mem = memory(8);
        let mut guest = Self {
            nic,
            rx: Ring::new(&mem, 0, 256),
            tx: Ring::new(&mem, Ring::bytes(256), 256),
            config_call: event_fd(),
            features,
            mem,
            seen: [0; 2],
            epoll: Epoll::new().unwrap(),
        };
        guest.activate([(0, 0); 2]);
        for _ in 0..buffers {
            guest.rx.offer_room(RX_BUFFER);
        }
        guest
    }

    /// A guest that goes on with a NIC made from a saved one's state.
    pub fn resumed(
        mut nic: Net,
        state: DeviceState,
        (rx, tx, mem): (Ring, Ring, GuestMemory),
        positions: [(u16, u16); 2],
    ) -> Self {
        nic.restore(state).unwrap();
        let mut guest = Self {
            nic,
            rx,
            tx,
            config_call: event_fd(),
            features: EVERYTHING,
            mem,
            seen: positions.map(|(_, used)| used),
            epoll: Epoll::new().unwrap(),
        };
        guest.activate(positions);
        guest
    }

    /// DRIVER_OK, or the resumption after a pause with those positions.
    pub fn activate(&mut self, positions: [(u16, u16); 2]) {
        let event_idx = self.features & EVENT_IDX != 0;
        let [rx, tx] = positions;
        let queues = vec![
            Some(self.rx.queue_at(event_idx, rx.0, rx.1)),
            Some(self.tx.queue_at(event_idx, tx.0, tx.1)),
        ];
        self.nic
            .activate(Activation {
                memory: self.mem.clone(),
                features: self.features,
                queues,
                config_interrupt: Interrupt::new(Arc::clone(&self.config_call)),
            })
            .unwrap();
        self.watch();
    }

    /// Stops the NIC and returns its positions.
    pub fn pause(&mut self) -> [(u16, u16); 2] {
        let states = self.nic.deactivate();
        [0, 1].map(|i| {
            let state = states[i].unwrap();
            (state.next_avail, state.next_used)
        })
    }

    pub fn watch(&mut self) {
        self.epoll = Epoll::new().unwrap();
        for source in self.nic.sources() {
            let event = EpollEvent::new(source.events, u64::from(source.token));
            self.epoll
                .ctl(ControlOperation::Add, source.fd, event)
                .unwrap();
        }
    }

    /// Serves the NIC until nothing of it is ready; returns how many events that took.
    pub fn serve(&mut self) -> Result<usize, Fault> {
        for events in 0..10_000 {
            let mut ready = [EpollEvent::default()];
            if self.epoll.wait(0, &mut ready).unwrap() == 0 {
                return Ok(events);
            }
            let token = u32::try_from(ready[0].data()).unwrap();
            if self.nic.handle(token, ready[0].event_set())? == Progress::SourcesChanged {
                self.watch();
            }
        }
        panic!("the NIC never becomes quiet");
    }

    /// Writes a frame into the transmit ring and kicks: the header and each 4 KiB of the frame in
    /// a descriptor of its own.
    pub fn post(&mut self, header: [u8; 12], frame: &[u8]) {
        let pieces: Vec<&[u8]> = [&header[..]]
            .into_iter()
            .chain(frame.chunks(4096))
            .collect();
        self.post_pieces(&pieces);
    }

    pub fn post_pieces(&mut self, pieces: &[&[u8]]) {
        let last = u16::try_from(pieces.len()).unwrap() - 1;
        for (i, piece) in (0..).zip(pieces) {
            let at = self.tx.buffer(i);
            self.mem.write_slice(piece, GuestAddress(at)).unwrap();
            let (flags, next) = if i == last { (0, 0) } else { (NEXT, i + 1) };
            let len = u32::try_from(piece.len()).unwrap();
            self.tx.describe(i, (at, len, flags, next));
        }
        self.tx.offer(0);
        self.tx.kick();
    }

    /// Sends one frame and waits for its buffer to come back.
    pub fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        self.post(header, frame);
        assert_eq!(self.wait_used(false), (0, 0));
    }

    /// The next frame that the guest gets with this EtherType: header and frame. Its buffers are
    /// offered again.
    pub fn receive(&mut self, ether_type: [u8; 2]) -> ([u8; 12], Vec<u8>) {
        loop {
            let mut bytes = self.take_buffer();
            let header: [u8; 12] = bytes[..12].try_into().unwrap();
            let buffers = u16::from_le_bytes([header[10], header[11]]);
            assert_ne!(buffers, 0, "a frame has a buffer at least");
            for _ in 1..buffers {
                // All of a frame is there once its first buffer is.
                let (head, len) = self.take_used(true).expect("the whole frame at once");
                bytes.extend(self.buffer(head, len));
            }
            let frame = bytes.split_off(12);
            if frame[12..14] == ether_type {
                return (header, frame);
            }
        }
    }

    fn take_buffer(&mut self) -> Vec<u8> {
        let (head, len) = self.wait_used(true);
        self.buffer(head, len)
    }

    fn buffer(&mut self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        let at = GuestAddress(self.rx.buffer(head));
        self.mem.read_slice(&mut bytes, at).unwrap();
        self.rx.describe(head, (at.0, RX_BUFFER, WRITE, 0));
        self.rx.offer(head);
        self.rx.kick();
        bytes
    }

    /// The next used entry of a ring, if there is one; asks for an interrupt at the one after.
    pub fn take_used(&mut self, rx: bool) -> Option<(u16, u32)> {
        let (ring, seen) = if rx {
            (&mut self.rx, &mut self.seen[0])
        } else {
            (&mut self.tx, &mut self.seen[1])
        };
        let used = ring.take_used()?;
        *seen = seen.wrapping_add(1);
        ring.set_used_event(*seen);
        Some(used)
    }

    fn wait_used(&mut self, rx: bool) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.serve().unwrap();
            if let Some(used) = self.take_used(rx) {
                return used;
            }
            assert!(Instant::now() < deadline, "no buffer comes back");
            // Where the kernel has the rings, it interrupts; else the TAP gets readable.
            let call = if rx { &self.rx.call } else { &self.tx.call };
            let fds = [call.as_raw_fd(), self.epoll.as_raw_fd()];
            wait_readable(fds, Duration::from_secs(1));
            let _interrupt = call.read();
        }
    }
}

/// Waits until one of the descriptors is readable, at most so long.
pub fn wait_readable<const N: usize>(fds: [RawFd; N], patience: Duration) {
    let mut polled = fds.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    let count = libc::nfds_t::try_from(N).unwrap();
    let millis = libc::c_int::try_from(patience.as_millis()).unwrap();
    // SAFETY: the kernel reads and writes `count` pollfds, which live across the call.
    unsafe { libc::poll(polled.as_mut_ptr(), count, millis) };
}
