//! How each kind of request is carried out: reads and flushes by the engine, concurrently, the
//! rest on this thread.
//!
//! Writes end in the host's page cache. A copy there is cheaper than a hand-over to one of
//! io_uring's workers, which is where file systems send buffered writes; and as each write is done
//! before the next request is looked at, no copy-up can undo one.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use super::disk::{GuestBytes, Piece};
use super::drive::Drive;
use super::engine::Op;
use super::request::{Action, ByteRange, Request, Status};
use super::running::{Running, submit_fault};
use super::slots::{Part, token};
use super::vectored::Direction;
use crate::devices::fault::{Fault, GuestFault};
use crate::devices::queue::{Segment, cut, write_segments};

/// A read in more pieces than this is done on the thread: bounds the operations of one request.
const MAX_PIECES: usize = 32;

impl Running {
    pub(super) fn start(&mut self, drive: &mut Drive, request: Request) -> Result<(), Fault> {
        match &request.action {
            Action::Refuse(status) => self.answer(&request, *status),
            Action::GetId => self.get_id(drive, &request),
            Action::Read(range) | Action::Write(range) if range.len == 0 => {
                self.finish(drive, &request, Ok(()))
            }
            Action::Read(range) => self.read(drive, *range, request),
            Action::Write(range) => self.write(drive, *range, request),
            Action::Flush => self.flush(drive, request),
            Action::Zero { ranges, unmap } => {
                let mut result = Ok(());
                for range in ranges.iter().filter(|range| range.len > 0) {
                    result = result.and_then(|()| drive.disk.zero(range.offset, range.len, *unmap));
                }
                if self.write_through {
                    result = result.and_then(|()| drive.sync());
                }
                self.finish(drive, &request, result)
            }
        }
    }

    fn read(&mut self, drive: &mut Drive, range: ByteRange, request: Request) -> Result<(), Fault> {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        drive.disk.plan_read(range.offset, range.len, &mut pieces);
        let done = if pieces.len() > MAX_PIECES {
            let result = self.read_stepwise(&pieces, range, &request);
            self.finish(drive, &request, result)
        } else {
            self.read_concurrently(drive, &pieces, range, request)
        };
        self.pieces = pieces;
        done
    }

    fn read_stepwise(
        &self,
        pieces: &[Piece],
        range: ByteRange,
        request: &Request,
    ) -> io::Result<()> {
        let target = GuestBytes {
            memory: &self.memory,
            segments: &request.data,
        };
        for piece in pieces {
            let skip = piece.offset - range.offset;
            match piece.fd {
                Some(fd) => {
                    target.transfer(Direction::Read, fd, skip, piece.offset, piece.len)?;
                }
                None => target.fill_zero(skip, piece.len)?,
            }
        }
        Ok(())
    }

    fn read_concurrently(
        &mut self,
        drive: &mut Drive,
        pieces: &[Piece],
        range: ByteRange,
        request: Request,
    ) -> Result<(), Fault> {
        let mut parts = self.fresh_parts(request.head);
        for piece in pieces {
            let skip = piece.offset - range.offset;
            let Some(fd) = piece.fd else {
                let target = GuestBytes {
                    memory: &self.memory,
                    segments: &request.data,
                };
                target
                    .fill_zero(skip, piece.len)
                    .map_err(|_outside| GuestFault::RingMemory)?;
                continue;
            };
            let whole = piece.len == range.len;
            let cut = (!whole).then(|| cut(&request.data, skip, piece.len));
            let segments = cut.as_deref().unwrap_or(&request.data);
            let vecs = self.add_vecs(request.head, segments)?;
            parts.push(Part {
                fd,
                offset: piece.offset,
                bytes: piece.len,
                vecs,
            });
        }
        self.start_parts(drive, request, parts)
    }

    fn write(
        &mut self,
        drive: &mut Drive,
        range: ByteRange,
        request: Request,
    ) -> Result<(), Fault> {
        let source = GuestBytes {
            memory: &self.memory,
            segments: &request.data,
        };
        let mut result = drive.disk.write(&source, range.offset);
        if self.write_through {
            result = result.and_then(|()| drive.sync());
        }
        self.finish(drive, &request, result)
    }

    fn flush(&mut self, drive: &mut Drive, request: Request) -> Result<(), Fault> {
        let file = drive.disk.written_file();
        let (true, false, Some(file)) = (drive.durable, drive.sync_failed, file) else {
            let result = if drive.sync_failed {
                drive.sync()
            } else {
                Ok(())
            };
            return self.finish(drive, &request, result);
        };
        let head = request.head;
        let slot = self.slots.get(head);
        slot.parts.clear();
        slot.left = 1;
        slot.request = Some(request);
        let op = Op::Sync { fd: file.as_fd() };
        match self
            .engine
            .start(token(head, 0), op)
            .map_err(submit_fault)?
        {
            Some(result) => self.operation_done(drive, head, result),
            None => {
                self.operations += 1;
                Ok(())
            }
        }
    }

    fn get_id(&mut self, drive: &mut Drive, request: &Request) -> Result<(), Fault> {
        let len = drive.serial.len().min(request.room as usize);
        let id = drive.serial.get(..len).unwrap_or_default();
        let copied = write_segments(&self.memory, &request.data, 0, id);
        self.answer(request, if copied { Status::Ok } else { Status::IoError })
    }

    /// The slot's list of parts, empty, to be given back by [`Self::start_parts`].
    fn fresh_parts(&mut self, head: u16) -> Vec<Part> {
        let slot = self.slots.get(head);
        slot.vecs.clear();
        let mut parts = std::mem::take(&mut slot.parts);
        parts.clear();
        parts
    }

    fn add_vecs(&mut self, head: u16, segments: &[Segment]) -> Result<Range<usize>, Fault> {
        let slot = self.slots.get(head);
        let start = slot.vecs.count();
        slot.vecs.extend(&self.memory, segments)?;
        Ok(start..slot.vecs.count())
    }

    /// Starts all operations of a request; its answer comes with the last of them.
    fn start_parts(
        &mut self,
        drive: &mut Drive,
        request: Request,
        parts: Vec<Part>,
    ) -> Result<(), Fault> {
        let head = request.head;
        if parts.is_empty() {
            return self.finish(drive, &request, Ok(()));
        }
        let count = parts.len();
        let slot = self.slots.get(head);
        slot.left = count;
        slot.parts = parts;
        slot.request = Some(request);
        for index in 0..count {
            let slot = self.slots.get(head);
            let Some(part) = slot.parts.get(index).cloned() else {
                break;
            };
            let op = Op::Read {
                fd: part.fd,
                vecs: slot.vecs.part(part.vecs),
                offset: part.offset,
            };
            match self
                .engine
                .start(token(head, index), op)
                .map_err(submit_fault)?
            {
                Some(result) => self.operation_done(drive, head, result)?,
                None => self.operations += 1,
            }
        }
        Ok(())
    }
}
