//! The client and what publishes through it, on a thread of their own.
//!
//! Its runtime has this one thread, and takes its tasks in the order in which they were woken (tokio's
//! `current_thread`): that is how a refusal is seen before the barrier behind it (see [`Refusals`]).

use super::access::Access;
use super::connect::{ConnectError, connect};
use super::publish::publish;
use super::refusals::Refusals;
use super::twin::Twin;
use crate::instances::outlet::Inlet;
use async_nats::Client;
use std::io;
use std::sync::Arc;
use std::thread;
use tokio::runtime::Builder;
use tokio::sync::oneshot;

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The client.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Its thread.
    #[error("cannot start the thread of the bus: {0}")]
    Thread(#[from] io::Error),
}

/// Makes the client and publishes what is said into the outlet of `inlet`, as long as the process lives.
/// Returns at once, with or without a server. If another agent has this id, `twin` is told, and nothing is said.
///
/// # Errors
/// When a setting cannot be used, or there can be no more threads.
pub async fn open(
    access: Access,
    id: &str,
    inlet: Inlet,
    twin: oneshot::Sender<Twin>,
) -> Result<Client, OpenError> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (tell, told) = oneshot::channel();
    let id = id.to_owned();
    let work = async move {
        let refusals = Arc::new(Refusals::new(inlet.refused.clone()));
        let told = (inlet.link.clone(), inlet.dropped.clone());
        match connect(access, &id, told, twin, Arc::clone(&refusals)).await {
            Ok(client) => {
                // Whoever opens it waits for the answer.
                let _gone = tell.send(Ok(client.clone()));
                publish(client, inlet, &refusals).await;
            }
            Err(error) => {
                let _gone = tell.send(Err(error));
            }
        }
    };
    thread::Builder::new()
        .name("bus".into())
        .spawn(move || runtime.block_on(work))?;
    let ended = || io::Error::other("it ended at once");
    Ok(told.await.map_err(|_| ended())??)
}
