//! A guest that reads and writes every register.
