//! The only room that names the NATS client: connect, subscribe, parse, route, answer, publish.

mod access;
mod arrivals;
mod cause;
mod connect;
mod open;
mod publish;
mod receive;
mod refusals;
mod replay;
mod tally;
#[cfg(test)]
mod testbed;
mod twin;

pub use access::{Access, AccessError, Surroundings};
pub use cause::{CLIENT_OFF, causes};
pub use open::open;
pub use receive::receive;
pub use tally::Tally;
pub use twin::Twin;
