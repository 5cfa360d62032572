//! The pool.
pub mod keys;
pub mod limits;
pub mod ssh;
