//! What arrives: parsed once, handed to the stable, answered.
//!
//! A command with a reply-to is answered exactly once, whatever happens: the duty to answer is a
//! channel, and losing that channel is itself an answer. Queries are answered as the protocol says.

use super::replay::{Replay, Seen};
use crate::instances::instance::events;
use crate::instances::outlet::Message as Outgoing;
use crate::instances::stable::Ask;
use crate::instances::world::World;
use async_nats::{Client, Message, Subscriber};
use futures_util::StreamExt;
use futures_util::stream::select_all;
use messages::command::{Asked, Command, Query, json, parse};
use messages::reply::{ErrorCode, Reply};
use messages::subjects::{Incoming, subscriptions};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{Instrument, debug, error, info_span, warn};

/// Answers of one query that may wait for the bus.
const ANSWERS: usize = 64;

/// How long an answer waits for a bus that is away.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// Everything an answer needs.
struct Desk {
    world: Arc<World>,
    asks: mpsc::Sender<Ask>,
    replay: Mutex<Replay>,
}

/// Subscribes, tells the stable that this host can be asked, and serves until it is dropped.
pub async fn receive(client: Client, world: Arc<World>, asks: mpsc::Sender<Ask>) {
    let base = world.config.base.clone();
    let replay = match crate::host::blocking(move || Replay::open(&base)).await {
        Ok(replay) => replay,
        Err(error) => {
            error!(%error, "no command can be taken");
            return;
        }
    };
    let mut subscribers: Vec<Subscriber> = Vec::new();
    for subject in subscriptions(&world.id) {
        match client.subscribe(subject).await {
            Ok(subscriber) => subscribers.push(subscriber),
            Err(error) => error!(%error, "cannot subscribe"),
        }
    }
    let mut messages = select_all(subscribers);
    let desk = Arc::new(Desk {
        world,
        asks,
        replay: Mutex::new(replay),
    });
    desk.ask(Ask::Ready).await;
    while let Some(message) = messages.next().await {
        let span = info_span!(parent: None, "request", subject = %message.subject);
        take(&desk, message).instrument(span).await;
    }
}

async fn take(desk: &Arc<Desk>, message: Message) {
    let Some(incoming) = Incoming::parse(&message.subject, &desk.world.id) else {
        debug!("not ours");
        return;
    };
    let reply_to = message.reply.map(|subject| subject.to_string());
    match parse(incoming, &message.payload) {
        Ok((Asked::Command(command), raw)) => command_to(desk, command, raw, reply_to).await,
        Ok((Asked::Query(query), _)) => query_to(desk, query, reply_to),
        Ok((Asked::Trigger(trigger), _)) => desk.ask(Ask::Trigger(trigger)).await,
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
    let ask = Ask::Command {
        command,
        raw: raw.clone(),
        answer,
    };
    tokio::spawn(answer_later(Arc::clone(desk), id, answered, reply_to));
    if !may_be_busy {
        // Stops and updates are never refused: here they wait.
        return desk.ask(ask).await;
    }
    if let Err(mpsc::error::TrySendError::Full(Ask::Command {
        command, answer, ..
    })) = desk.asks.try_send(ask)
    {
        let busy = Reply::error(ErrorCode::Busy, "too many commands at once: send it again");
        if matches!(command, Command::Start(_)) {
            desk.deliver_refusal(&raw, &busy);
        }
        drop(answer.send(busy));
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

fn query_to(desk: &Arc<Desk>, query: Query, reply_to: Option<String>) {
    // Nobody to answer: nothing to do.
    let Some(reply_to) = reply_to else { return };
    let (answers, mut answered) = mpsc::channel::<Vec<u8>>(ANSWERS);
    if desk.asks.try_send(Ask::Query { query, answers }).is_err() {
        debug!("too busy for a query");
        return;
    }
    let outlet = desk.world.outlet.clone();
    tokio::spawn(async move {
        while let Some(body) = answered.recv().await {
            outlet.send(Outgoing::plain(reply_to.clone(), body)).await;
        }
    });
}

impl Desk {
    async fn ask(&self, ask: Ask) {
        // The stable ends only when the agent does.
        drop(self.asks.send(ask).await);
    }

    async fn answer(&self, reply_to: Option<String>, reply: &Reply) {
        let Some(subject) = reply_to else { return };
        let message = Outgoing {
            subject,
            headers: reply.headers(),
            body: reply.body(),
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
