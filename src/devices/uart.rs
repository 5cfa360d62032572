//! The uart.
