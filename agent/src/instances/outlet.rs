//! What the instances' room says to the bus: a channel that the bus owns the other end of.
//!
//! Three strengths of saying something, from weak to strong:
//! [`Outlet::send`] is gone when the bus is (heartbeats, routes: the next one says it again);
//! [`Outlet::confirm`] tells whether everything said since a [`Mark`] has reached the server;
//! [`Outlet::deliver`] repeats until it has (exits, OOM events).

use tokio::sync::{mpsc, oneshot, watch};

/// One message for the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its subject.
    pub subject: String,
    /// Header names and values.
    pub headers: Vec<(&'static str, String)>,
    /// Its body; never empty.
    pub body: Vec<u8>,
}

impl Message {
    /// A message without headers.
    #[must_use]
    pub fn plain(subject: impl Into<String>, body: Vec<u8>) -> Self {
        Self {
            subject: subject.into(),
            headers: Vec::new(),
            body,
        }
    }
}

/// The state of the connection. `connects` counts successful connects, so two equal counts with `up`
/// mean one unbroken connection between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Link {
    /// Whether there is a connection now.
    pub up: bool,
    /// How many connects succeeded so far.
    pub connects: u64,
    /// The largest body that the server takes, in bytes.
    pub max_payload: usize,
}

/// What the bus is asked for.
#[derive(Debug)]
pub enum Request {
    /// Publish this, if there is a connection.
    Publish(Message),
    /// Answer with the number of connects once a message to ourselves, sent after everything before
    /// this request, has come back from the server. Dropped if the connection goes first.
    Barrier(oneshot::Sender<u64>),
}

/// The instances' end.
#[derive(Debug, Clone)]
pub struct Outlet {
    requests: mpsc::Sender<Request>,
    link: watch::Receiver<Link>,
}

/// A point in one connection's life; see [`Outlet::confirm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(Link);

impl Mark {
    /// Whether there was a connection.
    #[must_use]
    pub fn up(self) -> bool {
        self.0.up
    }

    /// The largest body, in bytes, that the server took then.
    #[must_use]
    pub fn max_payload(self) -> usize {
        self.0.max_payload
    }
}

/// Requests waiting for the bus task: enough to batch, few enough that a slow server is felt at once
/// by whoever publishes (64 records of output are 4 MiB).
const REQUESTS: usize = 64;

/// An outlet, and the two ends that the bus keeps.
#[must_use]
pub fn outlet() -> (Outlet, mpsc::Receiver<Request>, watch::Sender<Link>) {
    let (requests, asked) = mpsc::channel(REQUESTS);
    let (tell, link) = watch::channel(Link::default());
    (Outlet { requests, link }, asked, tell)
}

impl Outlet {
    /// Says it if there is a connection; otherwise it is gone.
    pub async fn send(&self, message: Message) {
        // The bus task ends only when the agent does.
        drop(self.requests.send(Request::Publish(message)).await);
    }

    /// The connection as it is now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(*self.link.borrow())
    }

    /// Whether everything sent since `mark` has reached the server. `false` means: unknown, say it
    /// again. Ends at the latest when the connection does.
    pub async fn confirm(&self, mark: Mark) -> bool {
        let (answer, answered) = oneshot::channel();
        if !mark.up() || self.requests.send(Request::Barrier(answer)).await.is_err() {
            return false;
        }
        answered
            .await
            .is_ok_and(|connects| connects == mark.0.connects)
    }

    /// Says it until the server has it. Waits for a connection as long as it takes.
    pub async fn deliver(&self, message: &Message) {
        loop {
            let mark = self.up().await;
            self.send(message.clone()).await;
            if self.confirm(mark).await {
                return;
            }
        }
    }

    /// Waits for a connection.
    pub async fn up(&self) -> Mark {
        let mut link = self.link.clone();
        let up = link.wait_for(|link| link.up).await.map(|link| Mark(*link));
        match up {
            Ok(mark) => mark,
            // The bus is gone, and so is the agent in a moment.
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until the connection is no longer the one of `mark`.
    pub async fn changed(&self, mark: Mark) {
        let mut link = self.link.clone();
        let changed = link.wait_for(|link| *link != mark.0).await.is_ok();
        if !changed {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Link, Message, Request, outlet};

    #[tokio::test]
    async fn a_confirmation_counts_only_on_the_connection_of_its_mark() {
        let (outlet, mut asked, tell) = outlet();
        tell.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        let mark = outlet.mark();
        let bus = async {
            for connects in [1, 2] {
                let Some(Request::Barrier(answer)) = asked.recv().await else {
                    panic!("no barrier")
                };
                answer.send(connects).unwrap();
            }
            let Some(Request::Barrier(dropped)) = asked.recv().await else {
                panic!("no barrier")
            };
            drop(dropped);
        };
        let reader = async {
            assert!(outlet.confirm(mark).await);
            assert!(!outlet.confirm(mark).await, "a reconnect came between");
            assert!(!outlet.confirm(mark).await, "the connection went");
        };
        tokio::join!(bus, reader);
    }

    #[tokio::test]
    async fn a_delivery_is_repeated_until_it_is_confirmed() {
        let (outlet, mut asked, tell) = outlet();
        let message = Message::plain("droplet.exited", b"{}".to_vec());
        let bus = async {
            tell.send_replace(Link {
                up: true,
                connects: 1,
                max_payload: 1 << 20,
            });
            for round in 1..=3 {
                let Some(Request::Publish(said)) = asked.recv().await else {
                    panic!("no message")
                };
                assert_eq!(said.subject, "droplet.exited");
                let Some(Request::Barrier(answer)) = asked.recv().await else {
                    panic!("no barrier")
                };
                if round == 3 {
                    answer.send(1).unwrap();
                }
            }
        };
        tokio::join!(bus, outlet.deliver(&message));
    }
}
