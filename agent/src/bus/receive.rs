//! What arrives: parsed once, handed to the stable, answered.
//!
//! A command with a reply-to is answered exactly once, whatever happens: the duty to answer is a
//! channel, and losing that channel is itself an answer. Queries are answered as the protocol says.

use super::arrivals::{Arrival, Arrivals};
use super::replay::{Replay, Seen};
use crate::instances::instance::events;
use crate::instances::outlet::Message as Outgoing;
use crate::instances::record::RecordError;
use crate::instances::stable::{self, Ask};
use crate::instances::world::World;
use async_nats::{Client, Message, Subscriber};
use messages::command::{Asked, Command, Query, json, parse};
use messages::reply::{ErrorCode, Reply};
use messages::subjects::{Incoming, subscriptions};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tracing::{Instrument, debug, error, info_span, warn};

/// How long an answer waits for a bus that is away.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// How long the client may be busy with what it was told last.
const SETTLE: Duration = Duration::from_millis(10);

/// How long the publisher may take to come to a pause.
const PAUSE_PATIENCE: Duration = Duration::from_secs(1);

/// Everything an answer needs.
struct Desk {
    world: Arc<World>,
    replay: Mutex<Replay>,
    /// Whatever is owed holds the desk, and so keeps this open.
    _owing: mpsc::Sender<Infallible>,
}

/// Subscribes, tells the stable that this host can be asked, and serves until `leave`. Then it hears
/// out what the server sent until it knew that nobody listens any more, and ends when every answer is
/// on its way.
///
/// # Errors
/// If the answers of earlier lives cannot be read.
pub async fn receive(
    client: Client,
    world: Arc<World>,
    asks: mpsc::Sender<Ask>,
    mut leave: oneshot::Receiver<()>,
) -> Result<(), RecordError> {
    let base = world.config.base.clone();
    let replay = crate::host::blocking(move || Replay::open(&base)).await?;
    let mut subscribers: Vec<Subscriber> = Vec::new();
    for subject in subscriptions(&world.id) {
        match client.subscribe(subject).await {
            Ok(subscriber) => subscribers.push(subscriber),
            Err(error) => error!(%error, "cannot subscribe"),
        }
    }
    let mut messages = Arrivals::of(subscribers);
    let (owing, mut owed) = mpsc::channel(1);
    let desk = Arc::new(Desk {
        world,
        replay: Mutex::new(replay),
        _owing: owing,
    });
    ask(&asks, Ask::Ready).await;
    let (mut leaving, mut quiet) = (false, None);
    loop {
        let message = tokio::select! {
            // The parting must not wait behind a flood.
            biased;
            _asked_or_alone = &mut leave, if !leaving => {
                leaving = true;
                if !desk.world.outlet.mark().up() {
                    break;
                }
                quiet = timeout(PAUSE_PATIENCE, desk.world.outlet.pause()).await.ok().flatten();
                // What was said just before is on its way then.
                sleep(SETTLE).await;
                messages.drain_one();
                continue;
            }
            arrival = messages.next() => match arrival {
                Some(Arrival::Message(message)) => message,
                // One after the other, and the host's own subject first.
                Some(Arrival::End) => {
                    messages.drain_one();
                    continue;
                }
                None => break,
            },
        };
        let span = info_span!(parent: None, "request", subject = %message.subject);
        take(&desk, &asks, message).instrument(span).await;
    }
    if !leaving {
        // The client is closed for good: nobody can be answered any more.
        return Ok(());
    }
    drop(quiet);
    // The stable has heard everything.
    drop(asks);
    drop(desk);
    // Nothing is ever sent: it ends when all have let go.
    while owed.recv().await.is_some() {}
    Ok(())
}

/// Waits for room in the stable's mailbox; it is closed only when the agent ends, and then the duty to
/// answer is dropped, which is an answer.
async fn ask(asks: &mpsc::Sender<Ask>, ask: Ask) {
    drop(asks.send(ask).await);
}

async fn take(desk: &Arc<Desk>, asks: &mpsc::Sender<Ask>, message: Message) {
    let reply_to = message.reply.map(|subject| subject.to_string());
    let Some(incoming) = Incoming::parse(&message.subject, &desk.world.id) else {
        // Of all subjects only this host's own are subscribed to with a wildcard.
        let verbs: Vec<&str> = Incoming::verbs_here().collect();
        let why = format!(
            "{} is no command: this host knows dea.{}.{{{}}}",
            message.subject,
            desk.world.id,
            verbs.join(",")
        );
        warn!(problem = why, "a message was not understood");
        return desk
            .answer(reply_to, &Reply::error(ErrorCode::BadSubject, why))
            .await;
    };
    match parse(incoming, &message.payload) {
        Ok((Asked::Command(command), raw)) => command_to(desk, asks, command, raw, reply_to).await,
        Ok((Asked::Query(query), _)) => query_to(desk, asks, query, reply_to),
        Ok((Asked::Trigger(trigger), _)) => ask(asks, Ask::Trigger(trigger)).await,
        Err(bad) => {
            warn!(problem = bad.message, "a message was not understood");
            let refusal = Reply::error(bad.code, bad.message);
            if incoming == Incoming::Start {
                let start = json(incoming, &message.payload).unwrap_or_default();
                desk.deliver_refusal(&start, &refusal);
            }
            if is_command(incoming) {
                desk.answer(reply_to, &refusal).await;
            }
        }
    }
}

/// Whether a message on this subject is answered even if it is not understood.
fn is_command(incoming: Incoming) -> bool {
    match incoming {
        Incoming::Start
        | Incoming::StopHere
        | Incoming::FindHere
        | Incoming::Scale
        | Incoming::Stop
        | Incoming::Update => true,
        Incoming::FindDroplet
        | Incoming::Locate
        | Incoming::Status
        | Incoming::Discover
        | Incoming::DropletStatus
        | Incoming::HealthmanagerStart
        | Incoming::RouterStart => false,
    }
}

async fn command_to(
    desk: &Arc<Desk>,
    asks: &mpsc::Sender<Ask>,
    command: Command,
    raw: serde_json::Value,
    reply_to: Option<String>,
) {
    let id = command.request_id().map(str::to_owned);
    if let Some(id) = &id {
        let seen = desk.replay.lock().await.see(id);
        match seen {
            Seen::Fresh => {}
            Seen::Answered(reply) => return desk.answer(reply_to, &reply).await,
            Seen::Pending(reply) => {
                tokio::spawn(answer_later(Arc::clone(desk), None, reply, reply_to));
                return;
            }
        }
    }
    let may_be_busy = matches!(
        command,
        Command::Start(_) | Command::Scale(_) | Command::FindHere(_)
    );
    let (answer, answered) = oneshot::channel();
    let asked = Ask::Command {
        command,
        raw: raw.clone(),
        answer,
    };
    tokio::spawn(answer_later(Arc::clone(desk), id, answered, reply_to));
    if !may_be_busy {
        // Stops and updates are never refused: here they wait.
        return ask(asks, asked).await;
    }
    let (asked, refusal) = match asks.try_send(asked) {
        Ok(()) => return,
        Err(mpsc::error::TrySendError::Full(asked)) => (
            asked,
            Reply::error(ErrorCode::Busy, "too many commands at once: send it again"),
        ),
        Err(mpsc::error::TrySendError::Closed(asked)) => (asked, stable::shutting_down()),
    };
    if let Ask::Command {
        command, answer, ..
    } = asked
    {
        if matches!(command, Command::Start(_)) {
            desk.deliver_refusal(&raw, &refusal);
        }
        drop(answer.send(refusal));
    }
}

/// Answers when the answer is there; if it is lost, that is the answer.
async fn answer_later(
    desk: Arc<Desk>,
    id: Option<String>,
    answered: oneshot::Receiver<Reply>,
    reply_to: Option<String>,
) {
    let reply = answered.await.unwrap_or_else(|_| {
        Reply::error(
            ErrorCode::Internal,
            "the agent lost this request: send it again",
        )
    });
    if let Some(id) = id {
        let keep = desk.replay.lock().await.answered(&id, &reply);
        if let Some(keep) = keep {
            let kept = crate::host::blocking(move || keep.write()).await;
            if let Err(error) = kept {
                warn!(%error, "a repetition after a restart would act again");
            }
        }
    }
    // An answer that falls due while the bus is away is owed all the same, for a while.
    if reply_to.is_some() {
        drop(timeout(ANSWER_PATIENCE, desk.world.outlet.up()).await);
    }
    desk.answer(reply_to, &reply).await;
}

fn query_to(desk: &Arc<Desk>, asks: &mpsc::Sender<Ask>, query: Query, reply_to: Option<String>) {
    // Nobody to answer: nothing to do.
    let Some(reply_to) = reply_to else { return };
    let (answers, mut answered) = mpsc::unbounded_channel::<Vec<u8>>();
    if asks.try_send(Ask::Query { query, answers }).is_err() {
        debug!("too busy for a query");
        return;
    }
    let desk = Arc::clone(desk);
    tokio::spawn(async move {
        while let Some(body) = answered.recv().await {
            let outlet = &desk.world.outlet;
            outlet.send(Outgoing::plain(reply_to.clone(), body)).await;
        }
    });
}

impl Desk {
    async fn answer(&self, reply_to: Option<String>, reply: &Reply) {
        let Some(subject) = reply_to else { return };
        let message = |reply: &Reply| Outgoing {
            subject,
            headers: reply.headers(),
            body: reply.body(),
        };
        let (size, most) = (reply.body().len(), self.world.outlet.mark().max_payload());
        let message = if size > most {
            let why = format!(
                "done, but its answer has {size} bytes and the bus takes {most}: ask for less at once"
            );
            message(&Reply::error(ErrorCode::TooLarge, why))
        } else {
            message(reply)
        };
        self.world.outlet.send(message).await;
    }

    /// Whoever only publishes a start learns by an exit that it was refused.
    fn deliver_refusal(&self, start: &serde_json::Value, refusal: &Reply) {
        if let Some(event) = events::refused(start, refusal) {
            events::deliver(self.world.outlet.clone(), event);
        }
    }
}
