//! One slot: a TAP and a /30, both locked host-wide for as long as the value lives.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use super::locks::{Lock, RunDir};
use super::{NetError, Subnet, tap};

/// The highest TAP number: keeps names within an interface's 15 characters.
const MAX_TAP: u32 = 99_999;

/// What a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotRole {
    /// `fleetingd0`, the one that builds; one at a time on a host.
    Build,
    Worker,
}

/// An open TAP with its addresses.
#[derive(Debug)]
pub struct Slot {
    number: u32,
    base: Ipv4Addr,
    tap: File,
    // Dropped after the TAP: the number is free only when the interface is gone.
    _tap_lock: Lock,
    _address_lock: Lock,
}

impl Slot {
    /// Locks a free TAP number and a free /30 of `subnet` and creates the TAP.
    pub(super) fn open(run: &RunDir, subnet: &Subnet, role: SlotRole) -> Result<Self, NetError> {
        let (number, tap_lock) = match role {
            SlotRole::Build => (0, run.try_lock("tap.0")?.ok_or(NetError::BuildSlotTaken)?),
            SlotRole::Worker => run.lock_first("tap.", 1..MAX_TAP)?,
        };
        let (base, address_lock) = lock_address(run, subnet)?;
        Ok(Self {
            number,
            base,
            tap: tap::create(number)?,
            _tap_lock: tap_lock,
            _address_lock: address_lock,
        })
    }

    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn role(&self) -> SlotRole {
        match self.number {
            0 => SlotRole::Build,
            _ => SlotRole::Worker,
        }
    }

    /// The TAP's interface name.
    pub fn name(&self) -> String {
        tap::name(self.number)
    }

    /// The host's end of the link.
    pub fn host_address(&self) -> Ipv4Addr {
        offset(self.base, 1)
    }

    /// The machine's address.
    pub fn guest_address(&self) -> Ipv4Addr {
        offset(self.base, 2)
    }

    /// Prefix length of the link's network.
    pub fn prefix_len(&self) -> u8 {
        30
    }

    /// The TAP's own MAC, locally administered and made of its address.
    pub fn host_mac(&self) -> [u8; 6] {
        mac(0x06, self.host_address())
    }

    /// The machine's MAC, likewise.
    pub fn guest_mac(&self) -> [u8; 6] {
        mac(0x02, self.guest_address())
    }

    /// Another descriptor of the TAP, for a VM; the slot keeps its own.
    pub fn tap(&self) -> io::Result<OwnedFd> {
        self.tap.try_clone().map(OwnedFd::from)
    }

    /// Throws away frames that were meant for the machine before.
    pub(super) fn drain(&self) {
        tap::drain(&self.tap);
    }
}

fn lock_address(run: &RunDir, subnet: &Subnet) -> Result<(Ipv4Addr, Lock), NetError> {
    for n in 0..subnet.slots() {
        let Some(base) = subnet.slot_base(n) else {
            break;
        };
        if let Some(lock) = run.try_lock(&format!("addr.{base}"))? {
            return Ok((base, lock));
        }
    }
    Err(NetError::SubnetFull {
        subnet: *subnet,
        slots: subnet.slots(),
        wanted: subnet.widened(),
    })
}

fn offset(base: Ipv4Addr, by: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(base).wrapping_add(by))
}

fn mac(first: u8, address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [first, 0xf1, a, b, c, d]
}
