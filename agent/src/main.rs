//! `ostler`: the host agent. `ostler agent` is the daemon, `ostler clean` removes what a killed one left.

mod bus;
mod config;
mod daemon;
mod engine;
mod host;
mod instances;
mod random;

use clap::{Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// What this agent calls itself on the bus.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs application instances in Linux containers, commanded over NATS with the DEA protocol.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent until a signal ends it.
    ///
    /// TERM, INT, QUIT: stop every app, leave nothing on the machine, end.
    /// HUP: end and leave the apps running; the next agent adopts them (upgrade, restart).
    /// KILL: the same without goodbye. Apps run on without an agent and without a bus.
    ///
    /// The agent needs root, Linux 6.1 or newer, and a configuration (packaging/ostler.toml is a
    /// commented sample). It starts without a reachable bus and waits for it.
    #[command(verbatim_doc_comment, after_help = AGENT_EXAMPLES)]
    Agent {
        #[command(flatten)]
        common: Common,
        /// Server addresses, separated by commas; wins over the configuration.
        #[arg(long, env = "NATS_URL", hide_env_values = true)]
        nats: Option<String>,
        /// How log lines on standard error look. RUST_LOG chooses what is logged (default: info).
        #[arg(long, value_enum, default_value = "text")]
        log: LogFormat,
    },
    /// Remove whatever a killed agent left: containers with their apps, control groups, links, the
    /// firewall table, directories. Refuses while an agent runs on the same base directory.
    Clean {
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, clap::Args)]
struct Common {
    /// The configuration file.
    #[arg(long, default_value = "/etc/ostler/ostler.toml")]
    config: PathBuf,
    /// Where everything is kept; wins over the configuration.
    #[arg(long)]
    base: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

const AGENT_EXAMPLES: &str = "Examples:
  ostler agent --config /etc/ostler/ostler.toml
  nats sub 'dea.>' 'droplet.>' 'router.>'                        # watch it
  nats req dea.<id>.start --no-templates \"$(cat start.json)\"      # start an app
  nats req dea.<id>.scale '{\"droplet\":\"my-app\",\"instances\":2}'  # two of them
  nats sub --raw 'droplet.output.my-app.>'                       # what they print
  nats req dea.stop '{\"droplet\":\"my-app\"}'                      # stop it everywhere";

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Agent { common, nats, log } => {
            start_log(log);
            daemon::agent(
                &common.config,
                config::Overrides {
                    nats_url: nats,
                    base: common.base,
                },
            )
        }
        Verb::Clean { common } => {
            start_log(LogFormat::Text);
            daemon::clean(
                &common.config,
                config::Overrides {
                    nats_url: None,
                    base: common.base,
                },
            )
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ostler: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(false).with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}
