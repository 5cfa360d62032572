//! The data path in the kernel: vhost-net moves frames between the rings and the TAP by itself.
//!
//! Runs only while the driver is active and the link is up; each run opens the kernel's device
//! anew and gives back how far it came. The kernel waits on the queues' kicks and signals their
//! interrupts; here is only its report of a ring it cannot follow.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as KernelNet;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::{GuestMemory, RunningQueue};

/// What concerns the kernel: the rings and, by the first two, a header of 12 bytes. Checksums and
/// segments are between the driver and the TAP.
const RING_FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_NET_F_MRG_RXBUF)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC);

/// Why vhost-net cannot take a pair of rings; the user-space path then does.
#[derive(Debug, thiserror::Error)]
pub(super) enum VhostError {
    #[error("cannot {act}: {source}")]
    Call {
        act: &'static str,
        source: vhost::Error,
    },
    #[error("cannot make an event descriptor")]
    EventFd(#[source] io::Error),
    #[error("guest memory has no host address")]
    Address,
}

/// Whether the kernel has vhost-net and it can all that we offer.
pub(super) fn is_available() -> bool {
    KernelNet::new(Arc::new(GuestMemory::new()))
        .and_then(|kernel| kernel.get_features())
        .is_ok_and(|features| features & RING_FEATURES == RING_FEATURES)
}

/// A run of vhost-net over receive (0) and transmit (1) ring.
pub(super) struct Vhost {
    kernel: KernelNet<Arc<GuestMemory>>,
    /// Rings the kernel was told of.
    set_up: [bool; 2],
}

impl std::fmt::Debug for Vhost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vhost")
            .field("set_up", &self.set_up)
            .finish_non_exhaustive()
    }
}

impl Vhost {
    /// Describes memory and rings to the kernel; nothing moves yet. `error` is signalled when it
    /// meets a ring that it cannot follow.
    pub fn prepare(
        memory: &GuestMemory,
        features: u64,
        rings: [Option<&RunningQueue>; 2],
        error: &EventFd,
    ) -> Result<Self, VhostError> {
        let kernel = KernelNet::new(Arc::new(memory.clone())).map_err(call("open vhost-net"))?;
        kernel.set_owner().map_err(call("own vhost-net"))?;
        kernel
            .set_features(features & RING_FEATURES)
            .map_err(call("set vhost features"))?;
        let regions = regions(memory)?;
        kernel
            .set_mem_table(&regions)
            .map_err(call("describe guest memory to vhost"))?;
        let mut vhost = Self {
            kernel,
            set_up: [false; 2],
        };
        for (index, ring) in rings.into_iter().enumerate() {
            if let Some(ring) = ring {
                vhost.set_up_ring(index, ring, error)?;
            }
            if let Some(set_up) = vhost.set_up.get_mut(index) {
                *set_up = ring.is_some();
            }
        }
        Ok(vhost)
    }

    fn set_up_ring(
        &self,
        index: usize,
        ring: &RunningQueue,
        error: &EventFd,
    ) -> Result<(), VhostError> {
        let state = ring.state();
        let kernel = &self.kernel;
        kernel
            .set_vring_num(index, state.size)
            .map_err(call("set a vhost ring's size"))?;
        kernel
            .set_vring_base(index, state.next_avail)
            .map_err(call("set a vhost ring's position"))?;
        kernel
            .set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: state.max_size,
                    queue_size: state.size,
                    flags: 0,
                    desc_table_addr: state.desc_table,
                    used_ring_addr: state.used_ring,
                    avail_ring_addr: state.avail_ring,
                    log_addr: None,
                },
            )
            .map_err(call("set a vhost ring's address"))?;
        kernel
            .set_vring_err(index, error)
            .map_err(call("set a vhost ring's error event"))?;
        let interrupt = ring.interrupt().event_fd();
        match interrupt {
            Some(fd) => kernel.set_vring_call(index, fd),
            // No vector: the kernel keeps its own reference to a descriptor nobody reads.
            None => kernel.set_vring_call(index, &nobody()?),
        }
        .map_err(call("set a vhost ring's interrupt"))?;
        kernel
            .set_vring_kick(index, ring.kick())
            .map_err(call("set a vhost ring's kick"))
    }

    /// From here the kernel moves frames. After an error the caller still has to [`Self::stop`].
    pub fn run(&self, tap: &File) -> Result<(), VhostError> {
        for (index, set_up) in self.set_up.iter().enumerate() {
            if *set_up {
                self.kernel
                    .set_backend(index, Some(tap))
                    .map_err(call("give the TAP to vhost"))?;
            }
        }
        Ok(())
    }

    /// Takes the TAP away, waits for what is being copied, and returns the next available index
    /// of each ring.
    pub fn stop(self) -> [Option<u16>; 2] {
        let mut positions = [None; 2];
        for ((index, set_up), position) in self.set_up.iter().enumerate().zip(&mut positions) {
            if !set_up {
                continue;
            }
            if let Err(e) = self.kernel.set_backend(index, None) {
                tracing::warn!("cannot stop vhost on ring {index}: {e}");
            }
            *position = match self.kernel.get_vring_base(index) {
                Ok(base) => u16::try_from(base & 0xffff).ok(),
                Err(e) => {
                    tracing::warn!("cannot ask vhost for its position on ring {index}: {e}");
                    None
                }
            };
        }
        positions
    }
}

fn call(act: &'static str) -> impl Fn(vhost::Error) -> VhostError {
    move |source| VhostError::Call { act, source }
}

fn nobody() -> Result<EventFd, VhostError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(VhostError::EventFd)
}

fn regions(memory: &GuestMemory) -> Result<Vec<VhostUserMemoryRegionInfo>, VhostError> {
    memory
        .iter()
        .map(|region| {
            let host = memory
                .get_host_address(region.start_addr())
                .map_err(|_unmapped| VhostError::Address)?;
            Ok(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host.addr() as u64,
                mmap_offset: 0,
                mmap_handle: -1,
            })
        })
        .collect()
}
