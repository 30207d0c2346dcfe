//! What the instances' room says to the bus: channels that the bus owns the other ends of.
//!
//! Four strengths of saying something, from weak to strong:
//! [`Outlet::offer`] never waits, and is gone when the bus is away or behind (heartbeats, routes: the
//! next one says it again); [`Outlet::send`] waits its turn, and is gone when the bus is;
//! [`Outlet::confirm`] tells whether everything sent since a [`Mark`] has reached the server;
//! [`Outlet::deliver`] repeats until it has (exits, OOM events).
//!
//! Output has a channel of its own, so that an app which prints a lot delays no heartbeat.

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
    /// Answer with a sender, and then say nothing until that is dropped, or for a second.
    Pause(oneshot::Sender<oneshot::Sender<()>>),
}

/// The instances' end.
#[derive(Debug, Clone)]
pub struct Outlet {
    control: mpsc::Sender<Request>,
    output: mpsc::Sender<Request>,
    link: watch::Receiver<Link>,
}

/// The ends that the bus keeps.
#[derive(Debug)]
pub struct Inlet {
    /// Everything but output; goes first.
    pub control: mpsc::Receiver<Request>,
    /// Output, in the order of each job.
    pub output: mpsc::Receiver<Request>,
    /// To be kept true.
    pub link: watch::Sender<Link>,
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

/// Control messages that may wait for the bus: a heartbeat, an advertisement and a thousand routes.
const CONTROL: usize = 1024;

/// Output messages that may wait for the bus: enough to batch, few enough that a slow server is felt at
/// once by whoever publishes (64 records are 4 MiB).
const OUTPUT: usize = 64;

/// An outlet, and the ends that the bus keeps.
#[must_use]
pub fn outlet() -> (Outlet, Inlet) {
    let (control, controls) = mpsc::channel(CONTROL);
    let (output, outputs) = mpsc::channel(OUTPUT);
    let (tell, link) = watch::channel(Link::default());
    let inlet = Inlet {
        control: controls,
        output: outputs,
        link: tell,
    };
    (
        Outlet {
            control,
            output,
            link,
        },
        inlet,
    )
}

impl Outlet {
    /// Says it if there is a connection that takes it now; otherwise it is gone.
    pub fn offer(&self, message: Message) {
        let subject = message.subject.clone();
        if self.link.borrow().up && self.control.try_send(Request::Publish(message)).is_err() {
            tracing::warn!(subject, "the bus is behind: a message was left out");
        }
    }

    /// Says it, after what waits already, if there is a connection then; otherwise it is gone.
    pub async fn send(&self, message: Message) {
        // The bus task ends only when the agent does.
        drop(self.control.send(Request::Publish(message)).await);
    }

    /// Says a piece of output; otherwise as [`Self::send`].
    pub async fn print(&self, message: Message) {
        drop(self.output.send(Request::Publish(message)).await);
    }

    /// The connection as it is now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(*self.link.borrow())
    }

    /// Whether everything printed since `mark` has reached the server. `false` means: unknown, say it
    /// again. Ends at the latest when the connection does.
    pub async fn confirm(&self, mark: Mark) -> bool {
        confirmed(&self.output, mark).await
    }

    /// Says it until the server has it. Waits for a connection as long as it takes.
    pub async fn deliver(&self, message: &Message) {
        loop {
            let mark = self.up().await;
            self.send(message.clone()).await;
            if confirmed(&self.control, mark).await {
                return;
            }
        }
    }

    /// Waits until the server has everything that was said, or the connection is gone.
    pub async fn settle(&self) {
        confirmed(&self.control, self.mark()).await;
    }

    /// From here on nothing is said, whatever is asked for, until what this returns is dropped.
    pub async fn pause(&self) -> Option<oneshot::Sender<()>> {
        let (tell, told) = oneshot::channel();
        self.control.send(Request::Pause(tell)).await.ok()?;
        told.await.ok()
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

async fn confirmed(channel: &mpsc::Sender<Request>, mark: Mark) -> bool {
    let (answer, answered) = oneshot::channel();
    if !mark.up() || channel.send(Request::Barrier(answer)).await.is_err() {
        return false;
    }
    answered
        .await
        .is_ok_and(|connects| connects == mark.0.connects)
}

#[cfg(test)]
mod tests {
    use super::{Link, Message, Request, outlet};

    #[tokio::test]
    async fn a_confirmation_counts_only_on_the_connection_of_its_mark() {
        let (outlet, mut inlet) = outlet();
        inlet.link.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        let mark = outlet.mark();
        let bus = async {
            for connects in [1, 2] {
                let Some(Request::Barrier(answer)) = inlet.output.recv().await else {
                    panic!("no barrier")
                };
                answer.send(connects).unwrap();
            }
            let Some(Request::Barrier(dropped)) = inlet.output.recv().await else {
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

    #[test]
    fn an_offer_never_waits() {
        let (outlet, inlet) = outlet();
        let offers = || {
            (0..3000).for_each(|_| outlet.offer(Message::plain("dea.heartbeat", b"{}".to_vec())))
        };
        offers();
        assert_eq!(inlet.control.len(), 0, "nobody is there");
        inlet.link.send_replace(Link {
            up: true,
            connects: 1,
            max_payload: 1 << 20,
        });
        offers();
        assert_eq!(inlet.control.len(), super::CONTROL);
    }

    #[tokio::test]
    async fn a_delivery_is_repeated_until_it_is_confirmed() {
        let (outlet, mut inlet) = outlet();
        let message = Message::plain("droplet.exited", b"{}".to_vec());
        let bus = async {
            inlet.link.send_replace(Link {
                up: true,
                connects: 1,
                max_payload: 1 << 20,
            });
            for round in 1..=3 {
                let Some(Request::Publish(said)) = inlet.control.recv().await else {
                    panic!("no message")
                };
                assert_eq!(said.subject, "droplet.exited");
                let Some(Request::Barrier(answer)) = inlet.control.recv().await else {
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
