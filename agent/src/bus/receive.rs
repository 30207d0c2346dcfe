//! What arrives: parsed once, handed to the stable, answered.
//!
//! A command with a reply-to is answered exactly once, whatever happens: the duty to answer is a
//! channel, and losing that channel is itself an answer. Queries are answered as the protocol says.

use super::arrivals::{Arrival, Arrivals};
use super::replay::{KEPT, Keep, Replay, Seen};
use super::tally::{self, Call, Tally};
use crate::host::Turns;
use crate::host::scribe::UNANSWERED;
use crate::instances::instance::events;
use crate::instances::outlet::{Message as Outgoing, Unsent};
use crate::instances::record::RecordError;
use crate::instances::stable::{self, Answers, Ask};
use crate::instances::world::World;
use async_nats::{Client, HeaderMap, Message, Subscriber};
use messages::command::{Asked, Command, Query, json, parse};
use messages::outgoing::ToBytes;
use messages::reply::{ErrorCode, Reply};
use messages::service::{self, Identity, Info, Ping, Question, Stats};
use messages::subjects::{COMPONENT_ANNOUNCE, COMPONENT_DISCOVER, Incoming, Kind, subscriptions};
use messages::trace::{self, Trace};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tracing::{Instrument, error, error_span, warn};

/// How long an answer waits for a bus that is away.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);

/// How long an answer waits until it is kept for its repetition.
const KEEPING: Duration = Duration::from_secs(2);

/// Answers that are written at once.
const KEEPERS: usize = 64;

/// How many times as many as are kept may wait for that.
const WAITING: usize = 4;

/// How long the client may be busy with what it was told last.
const SETTLE: Duration = Duration::from_millis(10);

/// How long the publisher may take to come to a pause.
const PAUSE_PATIENCE: Duration = Duration::from_secs(1);

/// What the stable may take to say how this host stands, and its disk how much output waits.
const HOST_PATIENCE: Duration = Duration::from_millis(200);

/// Bytes of answers that may wait for a bus that is slow, before what can be refused is, and queries are dropped.
const MANY: usize = 64 << 20;

/// As many as there may be: nothing more is heard until there are fewer. What arrives waits, or is dropped and counted.
const MOST: usize = 2 * MANY;

/// Between two looks at whether there are fewer.
const CATCH_UP: Duration = Duration::from_millis(10);

/// Everything an answer needs.
struct Desk {
    world: Arc<World>,
    replay: Mutex<Replay>,
    /// Of whoever writes an answer. Records do not wait behind those.
    keepers: Turns,
    /// Of answers that wait to be written.
    keeping: Arc<Semaphore>,
    identity: Identity,
    tally: Arc<Tally>,
    unsent: Unsent,
    /// Whatever is owed holds the desk, and so keeps this open.
    _owing: mpsc::Sender<Infallible>,
}

/// As soon as there is a bus: subscribes, tells the stable that this host can be asked, and serves until `leave`. Then it hears
/// out what the server sent until it knew that nobody listens any more, and ends when every answer is
/// on its way. `tally` counts what was answered.
///
/// # Errors
/// If the answers of earlier lives cannot be read.
pub async fn receive(
    client: Client,
    (world, tally): (Arc<World>, Arc<Tally>),
    asks: mpsc::Sender<Ask>,
    mut leave: oneshot::Receiver<()>,
) -> Result<(), RecordError> {
    let base = world.config.base.clone();
    let replay = crate::host::blocking(move || Replay::open(&base)).await?;
    tokio::select! {
        _asked_or_alone = &mut leave => return Ok(()),
        _ = world.outlet.up() => {}
    }
    let subscribers = subscribe(&client, &world).await;
    let mut messages = Arrivals::of(subscribers, world.outlet.drops());
    let (owing, mut owed) = mpsc::channel(1);
    let desk = Arc::new(Desk {
        identity: tally::identity(&world),
        world,
        replay: Mutex::new(replay),
        keepers: Turns::of(KEEPERS),
        keeping: Arc::new(Semaphore::new(WAITING * KEPT)),
        tally,
        unsent: Unsent::default(),
        _owing: owing,
    });
    desk.announce().await;
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
                messages.drain_one().await;
                continue;
            }
            arrival = desk.next(&mut messages) => match arrival {
                Some(Arrival::Message(message)) => message,
                // One after the other, and the host's own subject first.
                Some(Arrival::End) => {
                    messages.drain_one().await;
                    continue;
                }
                None => break,
            },
        };
        hear(&desk, &asks, message).await;
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

/// To all that this host hears; last to what is meant for it alone.
async fn subscribe(client: &Client, world: &World) -> Vec<Subscriber> {
    let mut subjects = service::subscriptions(&world.id);
    if world.component(0).is_some() {
        subjects.push(COMPONENT_DISCOVER.to_owned());
    }
    subjects.extend(subscriptions(&world.id));
    let mut subscribers = Vec::new();
    for subject in subjects {
        match client.subscribe(subject).await {
            Ok(subscriber) => subscribers.push(subscriber),
            Err(error) => error!(%error, "cannot subscribe"),
        }
    }
    subscribers
}

/// Waits for room in the stable's mailbox; it is closed only when the agent ends, and then the duty to
/// answer is dropped, which is an answer.
async fn ask(asks: &mpsc::Sender<Ask>, ask: Ask) {
    drop(asks.send(ask).await);
}

/// Takes a message in a span of its own, that names the trace.
async fn hear(desk: &Arc<Desk>, asks: &mpsc::Sender<Ask>, message: Message) {
    let trace = message.headers.as_ref().and_then(trace_of);
    // As strings, which are shown escaped.
    let (subject, id) = (message.subject.as_str(), trace.as_ref().map(Trace::id));
    let span = error_span!(parent: None, "request", subject, trace = id);
    take(desk, asks, message, trace).instrument(span).await;
}

/// The trace of a message with these headers. NATS keeps the case of their names, and senders vary it.
fn trace_of(headers: &HeaderMap) -> Option<Trace> {
    let values = |wanted: &str| -> Vec<&str> {
        let named = |name: &str| name.eq_ignore_ascii_case(wanted);
        let of = headers.iter().filter(|(name, _)| named(name.as_ref()));
        of.flat_map(|(_, values)| values.iter().map(AsRef::as_ref))
            .collect()
    };
    Trace::read(&values(trace::PARENT), &values(trace::STATE))
}

async fn take(desk: &Arc<Desk>, asks: &mpsc::Sender<Ask>, message: Message, trace: Option<Trace>) {
    let reply_to = message.reply.map(|subject| subject.to_string());
    if message.subject.as_str() == COMPONENT_DISCOVER {
        return desk.discovered(reply_to).await;
    }
    if let Some(question) = Question::parse(&message.subject, &desk.world.id) {
        let told = tell(Arc::clone(desk), asks.clone(), question, reply_to);
        tokio::spawn(told);
        return;
    }
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
            .reply((reply_to, trace), &Reply::error(ErrorCode::BadSubject, why))
            .await;
    };
    let call = Call {
        incoming,
        begun: Instant::now(),
        reply_to,
        trace,
    };
    match parse(incoming, &message.payload) {
        Ok((Asked::Command(command), raw)) => command_to(desk, asks, command, raw, call).await,
        Ok((Asked::Query(query), _)) => query_to(desk, asks, query, call).await,
        Ok((Asked::Trigger(trigger), _)) => ask(asks, Ask::Trigger(trigger)).await,
        Err(bad) => {
            warn!(problem = bad.message, "a message was not understood");
            let refusal = Reply::error(bad.code, bad.message);
            if incoming == Incoming::Start {
                let start = json(incoming, &message.payload).unwrap_or_default();
                desk.deliver_refusal(&start, call.trace.as_ref(), &refusal);
            }
            match incoming.kind() {
                Kind::Command => desk.answer(call, &refusal).await,
                Kind::Query => desk.tally.count(&call, Some(&refusal)),
                Kind::Trigger => {}
            }
        }
    }
}

async fn command_to(
    desk: &Arc<Desk>,
    asks: &mpsc::Sender<Ask>,
    command: Command,
    raw: serde_json::Value,
    call: Call,
) {
    let id = command.request_id().map(str::to_owned);
    if let Some(id) = &id {
        let seen = desk.replay.lock().await.see(id);
        match seen {
            Seen::Fresh => {}
            Seen::Answered(reply) => return desk.answer(call, &reply).await,
            Seen::Pending(reply) => {
                let answered = answer_later(Arc::clone(desk), None, reply, call);
                tokio::spawn(answered.in_current_span());
                return;
            }
        }
    }
    let may_be_busy = matches!(
        command,
        Command::Start(_) | Command::Scale(_) | Command::FindHere(_) | Command::Logs(_)
    );
    let (trace, (answer, answered)) = (call.trace.clone(), oneshot::channel());
    let asked = Ask::Command {
        command,
        raw: raw.clone(),
        trace: trace.clone(),
        answer,
    };
    tokio::spawn(answer_later(Arc::clone(desk), id, answered, call).in_current_span());
    if !may_be_busy {
        // Stops and updates are never refused: here they wait.
        return ask(asks, asked).await;
    }
    let taken = match desk.is_behind() {
        true => Err(mpsc::error::TrySendError::Full(asked)),
        false => asks.try_send(asked),
    };
    let (asked, refusal) = match taken {
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
            desk.deliver_refusal(&raw, trace.as_ref(), &refusal);
        }
        drop(answer.send(refusal));
    }
}

/// The answer as a bus that takes `most` bytes takes it. What was done and does not fit becomes an error that says
/// both; an error keeps its code, and its message is cut. Where nothing of that is left, the headers go, too.
fn fitting(dea: &str, subject: &str, reply: &Reply, most: usize) -> Outgoing {
    let message = |reply: &Reply| Outgoing {
        subject: subject.to_owned(),
        headers: reply.headers(),
        body: reply.body_of(dea),
    };
    let mut answer = message(reply);
    let size = answer.size();
    let mut reply = reply.clone();
    if size > most && matches!(reply, Reply::Ok(_)) {
        let why = format!(
            "done, but its answer has {size} bytes and the bus takes {most}: ask for less at once"
        );
        reply = Reply::error(ErrorCode::TooLarge, why);
        answer = message(&reply);
    }
    while answer.size() > most {
        let Some(shorter) = reply.cut() else {
            answer.headers.clear();
            break;
        };
        reply = shorter;
        answer = message(&reply);
    }
    answer
}

/// Answers when the answer is there; if it is lost, that is the answer.
async fn answer_later(
    desk: Arc<Desk>,
    id: Option<String>,
    answered: oneshot::Receiver<Reply>,
    call: Call,
) {
    let reply = answered.await.unwrap_or_else(|_| {
        Reply::error(
            ErrorCode::Internal,
            "the agent lost this request: send it again",
        )
    });
    if let Some(id) = id {
        let keep = desk.replay.lock().await.answered(&id, &reply);
        if let Some(keep) = keep
            && let Err(error) = desk.keep(keep).await
        {
            warn!(error, "a repetition after a restart would act again");
        }
    }
    desk.answer(call, &reply).await;
}

async fn query_to(desk: &Arc<Desk>, asks: &mpsc::Sender<Ask>, query: Query, call: Call) {
    // Nobody to answer: nothing to do.
    let Some(reply_to) = call.reply_to.clone() else {
        return;
    };
    // The protocol has no word for `busy`: as a server does with who reads too slowly.
    if desk.is_behind() {
        let dropped = desk.world.outlet.drops().count();
        warn!(
            dropped,
            "queries are dropped: their answers wait for the bus"
        );
        return;
    }
    let (answers, mut answered) = Answers::counted(desk.unsent.clone());
    // Here it waits, as stops do.
    ask(asks, Ask::Query { query, answers }).await;
    let desk = Arc::clone(desk);
    tokio::spawn(async move {
        while let Some((body, counted)) = answered.recv().await {
            let answer = Outgoing::plain(reply_to.clone(), body);
            let answer = answer.within(call.trace.as_ref());
            desk.world.outlet.answer(answer, counted).await;
        }
        desk.tally.count(&call, None);
    });
}

/// Answers what the services API asks of this host. A stable that is too busy to say how the host stands keeps
/// nobody waiting: whoever asks all hosts takes 300 ms of silence for the end (natscli, `nats req --replies`).
async fn tell(
    desk: Arc<Desk>,
    asks: mpsc::Sender<Ask>,
    question: Question,
    reply_to: Option<String>,
) {
    let Some(reply_to) = reply_to else { return };
    let identity = &desk.identity;
    let body = match question {
        Question::Ping => Ping::of(identity).to_bytes(),
        Question::Info => Info::of(identity).to_bytes(),
        Question::Stats => {
            let host = async {
                let (answer, answered) = oneshot::channel();
                match asks.try_send(Ask::Host(answer)) {
                    Ok(()) => timeout(HOST_PATIENCE, answered).await.ok(),
                    Err(_busy) => None,
                }
            };
            let (host, spooled) = tokio::join!(host, desk.world.depth.bytes(HOST_PATIENCE));
            let host = host.and_then(Result::ok).map(|standing| standing.host);
            // Nobody waits for the mailbox to close because the bus is slow.
            drop(asks);
            let data = tally::data(&desk.world.outlet, spooled, host);
            Stats::of(identity, desk.tally.since, desk.tally.counts(), data).to_bytes()
        }
    };
    let counted = desk.unsent.count(body.len());
    let answer = Outgoing::plain(reply_to, body);
    desk.world.outlet.answer(answer, counted).await;
}

impl Desk {
    /// Writes an answer; where that takes too long it goes on, and nobody waits for it. Where too many wait already it is not kept.
    async fn keep(&self, keep: Keep) -> Result<(), String> {
        let place = Arc::clone(&self.keeping).try_acquire_owned();
        let place = place.map_err(|_full| UNANSWERED.to_owned())?;
        let keepers = self.keepers.clone();
        let kept = tokio::spawn(async move {
            let kept = keepers.run(move || keep.write()).await;
            drop(place);
            kept.map_err(|error| error.to_string())
        });
        match timeout(KEEPING, kept).await {
            Ok(kept) => kept.unwrap_or_else(|error| Err(error.to_string())),
            Err(_late) => Err(UNANSWERED.to_owned()),
        }
    }

    /// What arrives next, once not too many answers wait.
    async fn next(&self, messages: &mut Arrivals) -> Option<Arrival> {
        while self.unsent.bytes() >= MOST {
            sleep(CATCH_UP).await;
        }
        messages.next().await
    }

    /// Whether more answers wait for the bus than should.
    fn is_behind(&self) -> bool {
        self.unsent.bytes() >= MANY
    }

    /// Tells everybody once where this host tells how it is.
    async fn announce(&self) {
        if let Some(mut component) = self.world.component(self.tally.since) {
            component.uptime = None;
            let announced = Outgoing::plain(COMPONENT_ANNOUNCE, component.to_bytes());
            self.world.outlet.send(announced).await;
        }
    }

    /// Tells whoever asks.
    async fn discovered(&self, reply_to: Option<String>) {
        let component = self.world.component(self.tally.since);
        if let (Some(reply_to), Some(component)) = (reply_to, component) {
            let answer = Outgoing::plain(reply_to, component.to_bytes());
            self.world.outlet.send(answer).await;
        }
    }

    /// Counts a command as answered, and answers it.
    async fn answer(self: &Arc<Self>, call: Call, reply: &Reply) {
        self.tally.count(&call, Some(reply));
        self.reply((call.reply_to, call.trace), reply).await;
    }

    /// Answers, if anybody asked for it. An answer that falls due while the bus is away is owed all the same,
    /// for a while.
    async fn reply(
        self: &Arc<Self>,
        (reply_to, trace): (Option<String>, Option<Trace>),
        reply: &Reply,
    ) {
        let Some(subject) = reply_to else { return };
        if self.world.outlet.mark().up() {
            return self.send(subject, trace.as_ref(), reply).await;
        }
        let (desk, reply) = (Arc::clone(self), reply.clone());
        let waiting = self.unsent.count(reply.body().len());
        tokio::spawn(async move {
            drop(timeout(ANSWER_PATIENCE, desk.world.outlet.up()).await);
            drop(waiting);
            desk.send(subject, trace.as_ref(), &reply).await;
        });
    }

    async fn send(&self, subject: String, trace: Option<&Trace>, reply: &Reply) {
        let most = self.world.outlet.mark().max_payload();
        let answer = fitting(&self.world.id, &subject, reply, most);
        let counted = self.unsent.count(answer.body.len());
        let answer = answer.within(trace);
        self.world.outlet.answer(answer, counted).await;
    }

    /// Whoever only publishes a start learns by an exit that it was refused.
    fn deliver_refusal(&self, start: &serde_json::Value, trace: Option<&Trace>, refusal: &Reply) {
        if let Some(event) = events::refused(start, refusal) {
            events::deliver(self.world.outlet.clone(), event, trace);
        }
    }
}
