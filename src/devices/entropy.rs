//! The entropy.
