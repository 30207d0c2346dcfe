//! A small NATS client for scripts and people without the `nats` tool.

#![allow(
    clippy::indexing_slicing,
    reason = "arguments are matched by slice patterns; a wrong count never gets past the match"
)]

use std::collections::HashMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use async_nats::Message;
use futures_util::StreamExt;
use futures_util::stream::select_all;
use tokio::time::{Instant, timeout_at};

const HELP: &str = "\
say: talks to a NATS server (NATS_URL, else nats://127.0.0.1:4222)

  say pub SUBJECT JSON                 publishes one message
  say req SUBJECT JSON [SECONDS]       sends a request, prints its answer (10 s); exit 1 if there is none
  say ask SUBJECT JSON [SECONDS]       prints all answers that come within SECONDS (2)
  say sub SECONDS UNTIL SUBJECT…       prints `subject body` of what comes, until a line holds the text UNTIL
                                       (then exit 0) or SECONDS are over (then exit 1; 0 if UNTIL is empty).
                                       It says `ready` on descriptor 2 once it is subscribed
  say raw SECONDS UNTIL SUBJECT…       the same, printing bodies only, as they are. Output of apps comes out as it
                                       went in: what an agent repeats is cut by its Ostler-Offset
";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("say: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["pub", subject, body] => {
            let nats = connect().await?;
            nats.publish((*subject).to_owned(), (*body).to_owned().into())
                .await?;
            nats.flush().await?;
            Ok(true)
        }
        ["req", subject, body] => request(subject, body, 10).await,
        ["req", subject, body, seconds] => request(subject, body, seconds.parse()?).await,
        ["ask", subject, body] => ask(subject, body, 2).await,
        ["ask", subject, body, seconds] => ask(subject, body, seconds.parse()?).await,
        ["sub", seconds, until, subjects @ ..] => {
            follow(subjects, seconds.parse()?, until, true).await
        }
        ["raw", seconds, until, subjects @ ..] => {
            follow(subjects, seconds.parse()?, until, false).await
        }
        _ => {
            print!("{HELP}");
            Ok(matches!(words.as_slice(), ["--help"]))
        }
    }
}

async fn connect() -> Result<async_nats::Client> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".into());
    let nats = async_nats::connect(&url).await;
    Ok(nats.map_err(|error| format!("no NATS server at {url}: {error}"))?)
}

async fn request(subject: &str, body: &str, seconds: u64) -> Result<bool> {
    let request = async_nats::Request::new()
        .payload(body.to_owned().into())
        .timeout(Some(Duration::from_secs(seconds)));
    let answer = connect()
        .await?
        .send_request(subject.to_owned(), request)
        .await;
    let answer = answer.map_err(|error| format!("{subject}: {error}"))?;
    println!("{}", String::from_utf8_lossy(&answer.payload));
    Ok(true)
}

async fn ask(subject: &str, body: &str, seconds: u64) -> Result<bool> {
    let nats = connect().await?;
    let inbox = nats.new_inbox();
    let mut answers = nats.subscribe(inbox.clone()).await?;
    nats.publish_with_reply(subject.to_owned(), inbox, body.to_owned().into())
        .await?;
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut any = false;
    while let Ok(Some(answer)) = timeout_at(deadline, answers.next()).await {
        println!("{}", String::from_utf8_lossy(&answer.payload));
        any = true;
    }
    Ok(any)
}

async fn follow(subjects: &[&str], seconds: u64, until: &str, with_subject: bool) -> Result<bool> {
    let nats = connect().await?;
    let mut subscriptions = Vec::new();
    for subject in subjects {
        subscriptions.push(nats.subscribe((*subject).to_owned()).await?);
    }
    let mut messages = select_all(subscriptions);
    nats.flush().await?;
    eprintln!("ready");
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut known = HashMap::new();
    while let Ok(Some(message)) = timeout_at(deadline, messages.next()).await {
        print(&message, with_subject, &mut known)?;
        if !until.is_empty() && String::from_utf8_lossy(&message.payload).contains(until) {
            return Ok(true);
        }
    }
    Ok(until.is_empty())
}

fn print(
    message: &Message,
    with_subject: bool,
    known: &mut HashMap<String, u64>,
) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if with_subject {
        let body = String::from_utf8_lossy(&message.payload);
        writeln!(out, "{} {}", message.subject, body.trim_end())?;
    } else {
        out.write_all(news(message, known))?;
    }
    out.flush()
}

/// What of a body was not there before: all of it, but for an app's output that comes again.
fn news<'a>(message: &'a Message, known: &mut HashMap<String, u64>) -> &'a [u8] {
    let header = |name: &str| {
        message
            .headers
            .as_ref()?
            .get(name)?
            .as_str()
            .parse::<u64>()
            .ok()
    };
    let body = &message.payload[..];
    let Some(offset) = header("Ostler-Offset") else {
        return body;
    };
    let next = known.entry(message.subject.to_string()).or_default();
    if let Some(dropped) = header("Ostler-Dropped") {
        *next = (*next).max(offset + dropped);
        eprintln!("say: {}", String::from_utf8_lossy(body).trim_end());
        return &[];
    }
    let end = offset + body.len() as u64;
    if offset > *next {
        eprintln!("say: {} has a hole: {} to {offset}", message.subject, *next);
    }
    let old =
        usize::try_from(next.saturating_sub(offset)).map_or(body.len(), |old| old.min(body.len()));
    *next = (*next).max(end);
    &body[old..]
}
