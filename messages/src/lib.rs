//! The wire: the types and subjects of the DEA protocol, and what Ostler adds to it.
//!
//! No I/O, no clock. What comes in is parsed once, by [`command::parse`], into a closed enum; what goes
//! out has exactly the names and types that the predecessors' strict decoders want. Controllers may
//! depend on this crate.

pub mod command;
pub mod crash;
pub mod field;
pub mod filter;
pub mod outgoing;
pub mod output;
pub mod reply;
pub mod service;
pub mod start;
pub mod state;
pub mod subjects;
pub mod trace;

#[cfg(test)]
mod fixtures;
