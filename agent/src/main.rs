//! `ostler`: the host agent. `ostler agent` is the daemon, `ostler clean` removes what a killed one left;
//! the other verbs are for a person on the host.

use clap::{Parser, Subcommand, ValueEnum};
use ostler::{cli, config, daemon};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::filter::FilterExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Runs application instances in Linux containers, commanded over NATS with the DEA protocol.
#[derive(Debug, Parser)]
#[command(version = ostler::VERSION, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent until a signal ends it.
    ///
    /// TERM, INT, QUIT: stop every app, leave nothing of them on the machine, end.
    /// HUP: end and leave the apps running; the next agent adopts them (upgrade, restart).
    /// KILL: the same without goodbye. Apps run on without an agent and without a bus.
    /// USR1: take no more starts. USR2: as USR1, tell that all apps are evacuated; they serve until
    /// others have taken their places, then the agent ends as after TERM.
    ///
    /// The agent needs root, Linux 6.1 or newer, and a configuration (packaging/ostler.toml is a
    /// commented sample). It starts without a reachable bus and waits for it.
    ///
    /// It ends with 0 after a signal, with 78 if what its configuration says is wrong, with 79 if another
    /// agent answers to this host's id (a copied machine), else with 1, also where the file or a stack is
    /// not there. The systemd unit does not start it again after 78 and 79.
    ///
    /// The bus is found by the same environment as by the nats command, which wins over the configuration:
    /// NATS_URL, NATS_USER, NATS_PASSWORD, NATS_TOKEN, NATS_CREDS, NATS_NKEY, NATS_JWT, NATS_SEED,
    /// NATS_CERT, NATS_KEY, NATS_CA, NATS_TIMEOUT, NATS_CONTEXT. Files are read again at each connect.
    #[command(verbatim_doc_comment, after_help = AGENT_EXAMPLES)]
    Agent {
        #[command(flatten)]
        common: Common,
        /// Server addresses, separated by commas; wins over NATS_URL, which wins over the configuration.
        /// A password in it is seen by whoever lists processes.
        #[arg(long, value_name = "URL,…")]
        nats: Option<String>,
        /// How log lines on standard error look. RUST_LOG chooses what is logged (default: info, without
        /// the bus client's own lines).
        #[arg(long, value_enum, default_value = "text")]
        log: LogFormat,
    },
    /// Remove whatever a killed agent left: containers with their apps, control groups, links, the
    /// firewall table, directories. Refuses while an agent runs on this host (in this
    /// network namespace) or on the same base directory.
    Clean {
        #[command(flatten)]
        common: Common,
    },
    /// Run a command in a container and wait for it.
    ///
    /// Pipes, and files to read, are the command's own; what goes to a file is copied there, so that nobody
    /// inside can keep it; in a terminal it gets one of the container's, which follows the size of yours.
    /// TERM, INT, HUP and QUIT are passed on. The exit code is the command's, 128+n when signal n ended it,
    /// 127: no such command, 126: it cannot be executed, 125 or 1: it was not run, or what it wrote could
    /// not be written to your file, and why is said. No agent needs to run.
    #[command(verbatim_doc_comment, after_help = RUN_EXAMPLES)]
    Run {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        inside: cli::Inside,
        /// The command and its arguments; searched in the container's PATH.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Open a user's shell in a container.
    ///
    /// As `ostler run` with the shell of the container's /etc/passwd. No agent needs to run.
    #[command(after_help = SHELL_EXAMPLES)]
    Shell {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        inside: cli::Inside,
    },
    /// Copy files and directories into a container or out of it.
    ///
    /// As `cp -r`: into TARGET if that is a directory, else under its name; SOURCE/. is what is in a
    /// directory. Names, permissions, symlinks and times of files are kept; out of a container without what your
    /// umask takes away, and 1,000,000 files at most. Set-id bits are dropped, hard links become files, everything belongs to whoever it is made by: to --user in a container, to you on
    /// the host. Fifos, sockets and devices are passed over. No program of the container takes part, and
    /// nothing in it can lead a copy out of TARGET. No agent needs to run.
    #[command(verbatim_doc_comment, after_help = CP_EXAMPLES)]
    Cp {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        cp: cli::CopyArguments,
    },
    /// Tell what this machine has and lacks for the agent and its containers.
    ///
    /// One line each: ok, warn (it works, but something is weaker) or missing (the agent does not start),
    /// what that means, and what to do. The exit code is 1 if something is missing. Everything is tried in
    /// throw-away namespaces: it changes nothing and may run beside an agent.
    #[command(verbatim_doc_comment)]
    Doctor {
        #[command(flatten)]
        common: Common,
        /// The report as JSON, for scripts.
        #[arg(long)]
        json: bool,
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

const RUN_EXAMPLES: &str = "Examples:
  ostler run my-app/0 -- ps aux | grep ruby       # as root of the container, in a pipe
  ostler run 0dk2 --user vcap -- bash -lc env     # by the beginning of its handle
  tar c logs | ostler run my-app --dir /tmp -- tar x";

const SHELL_EXAMPLES: &str = "Examples:
  ostler shell my-app --user vcap                 # the only instance of my-app here
  ostler shell 0dk2c4m8v01";

const CP_EXAMPLES: &str = "Examples:
  ostler cp my-app/0:/home/vcap/app/log ./log     # out of a container
  ostler cp --user vcap fix.rb my-app:app/        # into it; a relative path starts in the user's home
  ostler cp my-app:/var/log - | tar tv            # as a tar stream";

const AGENT_EXAMPLES: &str = "Examples:
  ostler agent --config /etc/ostler/ostler.toml
  nats sub 'dea.>' 'droplet.>' 'router.>'                        # watch it
  nats req dea.<id>.start --no-templates \"$(cat start.json)\"      # start an app
  nats req dea.<id>.scale '{\"droplet\":\"my-app\",\"instances\":2}'  # two of them
  nats sub --raw 'droplet.output.my-app.>'                       # what they print
  nats req --replies=0 dea.stop '{\"droplet\":\"my-app\"}'          # stop it everywhere";

fn main() -> ExitCode {
    match perform(Arguments::parse().verb) {
        Ok(code) => {
            ostler::flush_log();
            code
        }
        Err(error) => {
            ostler::last_words(&format!("ostler: {}\n", ostler::chain(&*error)));
            let hopeless = error.downcast_ref::<daemon::Hopeless>();
            hopeless.map_or(ExitCode::FAILURE, |why| why.exit_code().into())
        }
    }
}

fn perform(verb: Verb) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let done = match verb {
        Verb::Doctor { common, json } => {
            let (config, overrides) = common.split();
            return cli::doctor(&config, overrides, json);
        }
        Verb::Agent { common, nats, log } => {
            start_log(log);
            let overrides = config::Overrides {
                nats_url: nats,
                base: common.base,
            };
            daemon::agent(&common.config, overrides)
        }
        Verb::Clean { common } => {
            start_log(LogFormat::Text);
            let (config, overrides) = common.split();
            daemon::clean(&config, overrides)
        }
        Verb::Run {
            common,
            inside,
            command,
        } => {
            let (config, overrides) = common.split();
            cli::run(&config, overrides, &inside, &command)
        }
        Verb::Shell { common, inside } => {
            let (config, overrides) = common.split();
            cli::run(&config, overrides, &inside, &[])
        }
        Verb::Cp { common, cp } => {
            let (config, overrides) = common.split();
            cli::cp(&config, overrides, &cp)
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

impl Common {
    fn split(self) -> (PathBuf, config::Overrides) {
        let overrides = config::Overrides {
            nats_url: None,
            base: self.base,
        };
        (self.config, overrides)
    }
}

fn start_log(format: LogFormat) {
    // The bus client's own lines are left out: what matters of them the agent says itself.
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new(format!("info,{}", ostler::CLIENT_OFF)));
    let log = tracing_subscriber::fmt::layer().with_writer(|| ostler::LogOut);
    let log = match format {
        LogFormat::Text => {
            let plain = log.with_ansi(false).with_target(false);
            plain.map_event_format(ostler::GradedLog::new).boxed()
        }
        LogFormat::Json => log.json().boxed(),
    };
    let all = tracing_subscriber::registry()
        .with(log.with_filter(filter.and(ostler::Quiet)))
        .with(ostler::causes());
    all.init();
    std::panic::set_hook(Box::new(|fault| {
        let trace = Backtrace::capture();
        let mut words = format!("{fault}\n");
        if trace.status() == BacktraceStatus::Captured {
            words.push_str(&trace.to_string());
        }
        ostler::last_words(&words);
    }));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn every_verb_is_well_formed() {
        super::Arguments::command().debug_assert();
    }
}
