//! What a DEA does: instances with their states, droplets, health, routes, heartbeats, scaling, and
//! what of them is kept on disk. Knows containers by the engine and the bus by a channel.

pub mod crashes;
pub mod depth;
pub mod droplets;
pub mod instance;
pub mod ledger;
pub mod outlet;
pub mod output;
pub mod record;
pub mod routes;
pub mod scale;
pub mod stable;
pub mod startup;
pub mod state;
pub mod totals;
pub mod world;
