//! The only room that names the NATS client: connect, subscribe, parse, route, answer, publish.

mod arrivals;
mod connect;
mod publish;
mod receive;
mod replay;

pub use connect::connect;
pub use publish::publish;
pub use receive::receive;
