//! From an accepted start to RUNNING, and from a record back to where it was.

use super::finish::{DEAF, End, UNHEALTHY};
use super::health::{self, Check};
use super::hooks::Hook;
use super::{Instance, Interrupt, Remains, Wants, job_is};
use crate::chain;
use crate::config::Config;
use crate::engine::{Container, DiskLimit, EgressRule, REBOOTED, Spec, Traffic};
use crate::host::blocking;
use crate::host::cgroups;
use crate::host::depot::SeedFile;
use crate::instances::droplets::{self, Digest, Owner};
use crate::instances::output::{self, CursorFile, JobView, Source};
use crate::instances::record::Limits;
use crate::instances::startup;
use crate::instances::startup::environment::{AppEnv, Changed, retell};
use crate::instances::state::Ask;
use crate::instances::world::whole_seconds;
use container::job::{JobRequest, Rlimit};
use container::spool::Cursor;
use messages::state::State;
use serde_json::{Map, Value};
use std::error::Error;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{Instrument, error, warn};

/// The job of an app in its container.
pub(in crate::instances) const JOB: u32 = 1;

/// How long it may take at least until it is known that the job's program was executed. It takes
/// milliseconds, on a host that is up to its ears in work perhaps seconds.
const EXECUTED: Duration = Duration::from_secs(60);

/// Between two tries to find out whether a container lives.
const ADOPT_AGAIN: Duration = Duration::from_secs(5);

/// Size of an app's /dev/shm (Docker's default); its bytes count as the app's memory.
const SHM_BYTES: u64 = 64 << 20;

/// The limits of the message in the engine's units.
#[must_use]
pub(super) fn engine_limits(config: &Config, limits: Limits) -> cgroups::Limits {
    let shares = &config.instance.cpu_shares;
    let share = (limits.mem / config.instance.memory_to_cpu_share_ratio)
        .clamp(*shares.start(), *shares.end());
    cgroups::Limits {
        memory_bytes: Some(limits.mem << 20),
        // The kernel's least is 2 (cgroup v1, cpu.shares).
        cpu_shares: Some(share.max(2)),
        cpu_percent: Some(config.instance.max_cpu_percent.unwrap_or(u64::MAX)),
        pids: Some(config.instance.pids),
    }
}

impl Instance {
    /// A new instance: until something ends it.
    pub(super) async fn begin(&mut self) -> End {
        match self.start().await {
            Ok(()) => self.run().await,
            Err(end) => end,
        }
    }

    /// A stop that was wanted meanwhile is one, also where something has just failed.
    pub(super) async fn unless_stopped(&mut self, end: End) -> End {
        if !matches!(end, End::Failed(_)) {
            return end;
        }
        self.apply_wants().await;
        self.already(end)
    }

    /// An instance of an earlier life of the agent.
    pub(super) async fn resume(&mut self) -> End {
        let mut remains = self.remains.take();
        while let Some(Remains::Unknown(why)) = &remains {
            // Whether it lives nobody knows: nothing is announced, and nothing killed but what shall be stopped.
            error!(
                handle = self.record.handle,
                why, "a container cannot be adopted yet"
            );
            self.heed_for(ADOPT_AGAIN).await;
            remains = Some(Remains::of(&self.world, &self.record).await);
            let is_unknown = matches!(remains, Some(Remains::Unknown(_)));
            if is_unknown && self.record.stopping.is_some() {
                remains = Some(self.end_unknown().await);
            }
        }
        self.stuck = None;
        let died = match remains {
            Some(Remains::Alive(container)) => {
                self.found(container).await;
                None
            }
            Some(Remains::Dead(reason, container)) => {
                self.found(container).await;
                Some(reason)
            }
            Some(Remains::Unknown(_)) | None if self.record.boot_id != self.world.boot_id => {
                Some(REBOOTED.to_owned())
            }
            Some(Remains::Unknown(_)) | None => None,
        };
        // Its last output, and perhaps how it ended, are on the disk.
        if self.record.spawned && self.container.is_some() {
            match self.open_cursor().await {
                Ok(cursor) => self.follow(cursor),
                Err(error) => return failed(error),
            }
        }
        if self.record.exit.is_some() {
            return self.already(End::Known);
        }
        if self.record.state == State::Crashed {
            // Cut off between the state and its exit.
            return match &self.record.failure {
                _ if self.record.out_of_memory => End::OutOfMemory,
                Some(words) if words == UNHEALTHY => End::Unhealthy,
                Some(words) if words == DEAF => End::Deaf,
                failure => End::Died(failure.clone()),
            };
        }
        match died {
            Some(reason) if self.record.spawned => self.already(End::Died(Some(reason))),
            None if self.record.spawned && self.container.is_some() => {
                self.keep_to_configuration().await;
                self.carry_on().await
            }
            Some(_) | None => self.begin_again().await,
        }
    }

    /// Ends what shall be stopped and cannot be asked to, and looks for it again.
    async fn end_unknown(&mut self) -> Remains {
        self.close_route();
        let ended = self.world.engine.end_processes(&self.record.handle).await;
        let remains = Remains::of(&self.world, &self.record).await;
        // Whoever waits for the end is not kept waiting.
        self.stuck = match (&remains, ended) {
            (Remains::Unknown(_), Err(error)) => Some(chain(&error).to_string()),
            (Remains::Unknown(why), Ok(())) => Some(why.clone()),
            (Remains::Alive(_) | Remains::Dead(..), _) => None,
        };
        self.tell();
        remains
    }

    /// Takes up the container of an earlier life.
    async fn found(&mut self, container: Container) {
        // Killed just after the job was handed over: it ran all the same.
        let job = container.job(JOB);
        self.record.spawned |= blocking(move || job.exists()).await;
        self.container = Some(container);
    }

    /// An adopted container may use, receive and send what is configured now.
    async fn keep_to_configuration(&mut self) {
        let Some(container) = self.container.clone() else {
            return;
        };
        let limits = cgroups::Limits {
            memory_bytes: None,
            ..engine_limits(&self.world.config, self.record.limits)
        };
        if let Err(error) = container.limit(limits).await {
            warn!(
                handle = self.record.handle,
                error = %chain(&error), "an instance keeps the limits on processes and processor time that it had"
            );
        }
        self.keep_to_bandwidth(&container).await;
    }

    async fn keep_to_bandwidth(&mut self, container: &Container) {
        let wanted = self.world.config.instance.bandwidth;
        let recorded = container.saved().bandwidth == wanted;
        if recorded
            && container
                .bandwidth()
                .await
                .is_ok_and(|found| found == wanted)
        {
            return;
        }
        match container.limit_bandwidth(wanted).await {
            Ok(()) => {
                self.record.container = Some(container.saved());
                self.keep().await;
            }
            Err(error) => warn!(
                handle = self.record.handle,
                error = %chain(&error), "an instance keeps the bandwidth that it had"
            ),
        }
    }

    /// Records what is wanted meanwhile, and does no more about it. It has no container to measure.
    async fn heed_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            self.apply_wants().await;
            tokio::select! {
                Ok(()) = self.wants.changed() => {}
                Some(query) = self.queries.recv() => self.answer(query).await,
                outcome = self.scribe.landed() => self.recorded(Some(outcome)),
                () = sleep_until(until) => return,
            }
        }
    }

    /// Accepted, and cut off before the app ran: nothing of it can be missed.
    async fn begin_again(&mut self) -> End {
        self.tell_kills_as_survived().await;
        let destroyed = match (self.container.clone(), self.record.container.clone()) {
            (Some(container), _) => container.destroy().await,
            (None, Some(saved)) => self.world.engine.destroy_handle(&saved).await,
            (None, None) => Ok(()),
        };
        let vacated = match destroyed {
            Ok(()) => self.world.engine.vacate(&self.record.handle).await,
            Err(error) => Err(error),
        };
        if let Err(error) = vacated {
            return failed(error);
        }
        (self.container, self.record.container) = (None, None);
        self.record.spawned = false;
        if self.record.state == State::Evacuating {
            // If the host is emptied still, that is wanted again.
            self.record.state = State::Starting;
        }
        // The next container's counter begins at 0.
        (self.record.oom_kills, self.record.out_of_memory) = (0, false);
        // What is known of the job that never ran, and its cursor, are none for the next.
        self.job = watch::channel(JobView::default()).1;
        self.followed = false;
        self.ooms = None;
        self.keep().await;
        self.tell();
        let cursor = self.cursor_path();
        blocking(move || drop(std::fs::remove_file(cursor))).await;
        if self.record.stopping.is_some() {
            return End::Stop;
        }
        self.begin().await
    }

    /// What is to be done with an end that came before this life: a stop stays a stop.
    fn already(&self, end: End) -> End {
        if self.record.stopping.is_some() {
            End::Stop
        } else {
            end
        }
    }

    async fn carry_on(&mut self) -> End {
        if self.record.stopping.is_some() {
            return End::Stop;
        }
        if self.record.out_of_memory {
            // The kill was told, and what follows it was cut off.
            return End::OutOfMemory;
        }
        if !self.record.serves() {
            let started = self.until_started().await;
            let never_ran = self.job.borrow().never_ran();
            match started {
                // A stop and an end are seen again by what follows, a kill is told once.
                Err(end @ End::OutOfMemory) => return end,
                Err(_) if never_ran => return self.begin_again().await,
                Err(end @ End::Failed(_)) => return end,
                Ok(_) | Err(_) => {}
            }
            let healthy = match self.layer().await {
                Ok((layer, _)) => self.become_healthy(&layer).await,
                Err(end) => Err(end),
            };
            if let Err(end) = healthy {
                return end;
            }
        }
        self.run().await
    }

    /// RUNNING until something ends it.
    async fn run(&mut self) -> End {
        if self.record.after_start {
            if let Err(end) = self.start_hook(Hook::AfterStart).await {
                return end;
            }
            self.record.after_start = false;
            self.keep().await;
        }
        loop {
            match self.attend(self.deaf()).await {
                Err(interrupt) => return interrupt.into(),
                // Without a route it need not listen.
                Ok(()) if self.record.uris.is_empty() => {}
                Ok(()) => return End::Deaf,
            }
        }
    }

    /// Resolves once its app, which opened its port, listens there no longer; never where nobody looks.
    fn deaf(&self) -> impl Future<Output = ()> + use<> {
        let interval = self.world.config.instance.liveness_interval;
        let listened = self.record.listens.then(|| self.container.clone());
        let watched = interval.zip(listened.flatten()).zip(self.address());
        async move {
            match watched {
                Some(((interval, container), address)) => {
                    health::deaf(container, address, interval).await;
                }
                None => std::future::pending().await,
            }
        }
    }

    /// Where its app listens, if it does.
    fn address(&self) -> Option<SocketAddrV4> {
        let container = self.container.as_ref()?;
        let port = self.record.port?;
        Some(SocketAddrV4::new(container.saved().lease.container, port))
    }

    async fn start(&mut self) -> Result<(), End> {
        let (layer, owner) = self.layer().await?;
        let message_command = self.message.start_command.clone();
        let from = layer.clone();
        let staging = blocking(move || droplets::staging_info(&from))
            .await
            .map_err(failed)?;
        let command = startup::start_command(message_command.as_deref(), staging.as_ref());
        let post_setup = self.world.config.hooks.post_setup.as_deref();
        let script = startup::script::startup(&command.map_err(failed)?, post_setup);
        let world = Arc::clone(&self.world);
        // Never closed.
        let turn = self.attend(world.starts.acquire()).await?;
        let made_with = self.record.limits;
        let container = self.create(layer.clone(), owner, script).await?;
        self.container = Some(container.clone());
        if self.record.limits != made_with {
            // They changed while it was made.
            let disk = self.record.limits.disk;
            let changed = self.limit_disk(&container, made_with.disk, disk).await;
            changed.map_err(failed)?;
            let limits = engine_limits(&self.world.config, self.record.limits);
            container.limit(limits).await.map_err(failed)?;
        }
        let (port, _) = container.map_port(None, None).await.map_err(failed)?;
        self.record.port = Some(port);
        self.record.container = Some(container.saved());
        // Without this record the next agent would take the container for nobody's.
        self.must_save().await.map_err(failed)?;
        // A hook may take as long as it may: that keeps nobody waiting.
        drop(turn);
        self.start_hook(Hook::BeforeStart).await?;
        // What it begins with it must be able to write.
        let mut disk = self.world.scribes.lateness();
        self.attend(disk.passes()).await?;
        let turn = self.attend(world.starts.acquire()).await?;
        let cursor = self.attend(self.open_cursor()).await?.map_err(failed)?;
        let request = self.job_request(port)?;
        let user = self.world.config.instance.user.clone();
        self.open_files = Some(self.record.limits.fds);
        container.spawn(JOB, &user, request).await.map_err(failed)?;
        self.record.spawned = true;
        self.keep().await;
        self.follow(cursor);
        self.until_started().await?;
        // So may its app.
        drop(turn);
        self.become_healthy(&layer).await
    }

    /// The unpacked droplet, and to whom it belongs inside.
    async fn layer(&mut self) -> Result<(PathBuf, Owner), End> {
        let stack = self.stack()?;
        let user = self.world.config.instance.user.clone();
        let owner = blocking(move || startup::passwd::lookup(&stack, &user))
            .await
            .map_err(failed)?;
        let uri = self.message.executable_uri.clone();
        let uri = uri.ok_or_else(|| failed("executableUri is missing"))?;
        let hex = self.message.sha256.as_ref().or(self.message.sha1.as_ref());
        let hex = hex.ok_or_else(|| failed("sha1 or sha256 is missing"))?;
        let digest = Digest::from_hex(hex).map_err(failed)?;
        let droplets = self.world.droplets.clone();
        let layer = self
            .attend(async move { droplets.layer(&uri, &digest, owner).await })
            .await?;
        Ok((layer.map_err(failed)?, owner))
    }

    fn stack(&self) -> Result<PathBuf, End> {
        let name = self.message.stack.clone().unwrap_or_default();
        let known = &self.world.config.stacks;
        known
            .get(&name)
            .cloned()
            .ok_or_else(|| failed(format!("unknown stack {name:?}")))
    }

    async fn create(
        &mut self,
        layer: PathBuf,
        owner: Owner,
        script: Option<String>,
    ) -> Result<Container, End> {
        let script = script.map(|script| SeedFile {
            path: startup::script::PATH.into(),
            mode: 0o755,
            uid: owner.uid,
            gid: owner.gid,
            bytes: script.into_bytes(),
        });
        let engine = self.world.engine.clone();
        let place = match self.place.take() {
            Some(place) => place,
            None => engine.reserve().map_err(failed)?,
        };
        let config = &self.world.config;
        let spec = Spec {
            handle: self.record.handle.clone(),
            stack: self.stack()?,
            layers: vec![layer],
            hostname: self.record.handle.clone(),
            limits: engine_limits(config, self.record.limits),
            disk: DiskLimit {
                bytes: self.record.limits.disk << 20,
                inodes: config.instance.disk_inodes,
            },
            tmpfs_bytes: SHM_BYTES,
            files: script.into_iter().collect(),
            dns: config.network.dns.clone(),
            binds: config.bind_mounts.clone(),
            egress: self
                .message
                .egress_network_rules
                .iter()
                .map(egress)
                .collect(),
            bandwidth: config.instance.bandwidth,
        };
        let created = self
            .attend(async move { engine.create(spec, place).await })
            .await?;
        created.map_err(failed)
    }

    /// What its app reads of it: what has changed since its start message as it is now.
    fn told(&self) -> Map<String, Value> {
        let (message, record) = (&self.message, &self.record);
        let now = |now: u64, then: u64| (now != then).then_some(now);
        let mut told = message.vcap_application.clone();
        let changed = Changed {
            uris: (record.uris != message.uris).then_some(&record.uris),
            version: (record.version != message.version).then_some(&record.version),
            mem: now(record.limits.mem, message.limits.mem),
            disk: now(record.limits.disk, message.limits.disk),
            fds: now(record.limits.fds, message.limits.fds),
        };
        retell(&mut told, changed);
        told
    }

    pub(super) fn job_request(&self, port: u16) -> Result<JobRequest, End> {
        let message = &self.message;
        let environment = startup::environment::build(&AppEnv {
            vcap_application: &self.told(),
            services: &message.services,
            user: &message.env,
            application_id: message.droplet.as_str(),
            instance_id: &self.record.instance,
            index: message.index,
            memory_mb: self.record.limits.mem,
            host_ip: self.world.engine.local_ip(),
            host_port: port,
            container_port: port,
            started_at: whole_seconds(self.record.started_at),
            trace: self.record.trace.as_ref(),
        })
        .map_err(failed)?;
        let pair = |(name, value): (String, String)| format!("{name}={value}").into_bytes();
        let fds = self.record.limits.fds;
        Ok(JobRequest {
            job: JOB,
            argv: startup::script::JOB
                .map(|arg| arg.as_bytes().to_vec())
                .to_vec(),
            env: environment.into_iter().map(pair).collect(),
            cwd: Some(b"/home/vcap".to_vec()),
            rlimits: vec![Rlimit {
                resource: nix::libc::RLIMIT_NOFILE,
                soft: fds,
                hard: fds,
            }],
            umask: Some(0o077),
            keep_readers: true,
            copy: None,
        })
    }

    /// Starts the pump; the job's end is seen by [`Instance::attend`] from now on.
    fn follow(&mut self, (file, cursor, known): (CursorFile, Cursor, JobView)) {
        let Some(container) = self.container.clone() else {
            return;
        };
        let source = Source {
            subject: messages::subjects::output(
                &self.message.droplet,
                self.message.index,
                &self.record.handle,
            ),
            handle: self.record.handle.clone(),
            instance: self.instance_id.subscribe(),
            missing: self.world.totals.missing_output.clone(),
        };
        let (view, job) = watch::channel(known);
        self.job = job;
        self.followed = true;
        self.ooms = Some(container.oom(self.record.oom_kills));
        let pump = output::pump(
            (container, self.world.scribes.lateness()),
            self.world.outlet.clone(),
            source,
            (file, cursor),
            view,
        );
        tokio::spawn(pump.in_current_span());
    }

    /// How far its output has got, and what is known of the job.
    fn open_cursor(
        &self,
    ) -> impl Future<Output = std::io::Result<(CursorFile, Cursor, JobView)>> + use<> {
        let (path, scribes) = (self.cursor_path(), self.world.scribes.clone());
        blocking(move || CursorFile::open(&path, &scribes))
    }

    fn cursor_path(&self) -> PathBuf {
        self.world.records.cursor(&self.record.handle)
    }

    async fn until_started(&mut self) -> Result<(), End> {
        let mut job = self.job.clone();
        let limit = self.health_limit().max(EXECUTED);
        let started = self
            .attend(timeout(limit, async move {
                job_is(&mut job, |job| job.started).await;
            }))
            .await?;
        if started.is_err() {
            let said = match self.container.clone() {
                Some(container) => blocking(move || container.last_words()).await,
                None => String::new(),
            };
            return Err(failed(format!(
                "nothing is known of the app after {limit:?}: its supervisor or linker does not work: {said}"
            )));
        }
        self.open_as_many_files().await
    }

    /// Its number of open files may have changed since it was spawned, and by now it has its own.
    async fn open_as_many_files(&mut self) -> Result<(), End> {
        let fds = self.record.limits.fds;
        if let Some(container) = &self.container
            && self.open_files != Some(fds)
        {
            container.limit_open_files(0, fds).await.map_err(failed)?;
            self.open_files = Some(fds);
        }
        Ok(())
    }

    /// How long its port may take to open.
    fn health_limit(&self) -> Duration {
        match self.message.health_check_timeout {
            Some(seconds) => Duration::from_secs(seconds),
            None => self.world.config.instance.health_check_timeout,
        }
    }

    async fn become_healthy(&mut self, layer: &Path) -> Result<(), End> {
        let begun = Instant::now();
        let listens = loop {
            let (check, limit) = self.check(layer).await?;
            let listens = matches!(check, Check::Port(_));
            let healthy = health::healthy(check, limit.saturating_sub(begun.elapsed()));
            let loses_uris = self.loses_uris();
            let either = async {
                tokio::select! {
                    biased;
                    healthy = healthy => Some(healthy),
                    () = loses_uris, if listens => None,
                }
            };
            match self.attend(either).await? {
                Some(true) => break listens,
                Some(false) => return Err(End::Unhealthy),
                // Its record says so, or will in a moment: it need not listen any more.
                None => {}
            }
        };
        (self.record.healthy, self.record.listens) = (true, listens);
        self.record.after_start = self.world.config.hooks.after_start.is_some();
        if !self.enter(Ask::Healthy).await {
            // It stays EVACUATING, and serves from now on.
            self.keep().await;
            self.tell();
        }
        self.open_route();
        Ok(())
    }

    /// Resolves when it is told to have none.
    fn loses_uris(&self) -> impl Future<Output = ()> + use<> {
        let mut wants = self.wants.clone();
        async move {
            let none =
                |wants: &Wants| { wants.update.as_ref() }.is_some_and(|it| it.uris.is_empty());
            if wants.wait_for(none).await.is_err() {
                std::future::pending().await
            }
        }
    }

    async fn check(&self, layer: &Path) -> Result<(Check, Duration), End> {
        let layer = layer.to_owned();
        let state_file = blocking(move || droplets::state_file(&layer))
            .await
            .map_err(failed)?;
        let limit = self.health_limit();
        let Some(container) = &self.container else {
            return Ok((Check::None, limit));
        };
        Ok(match (state_file.zip(container.disk()), self.address()) {
            (Some((path, disk)), _) => {
                let check = Check::StateFile {
                    disk,
                    path: format!("home/vcap/{path}"),
                };
                (check, health::STATE_FILE_TIMEOUT)
            }
            (None, Some(address)) if !self.record.uris.is_empty() => {
                (Check::Port(address.into()), limit)
            }
            (None, _) => (Check::None, limit),
        })
    }
}

/// A rule of the message in the engine's words.
fn egress(rule: &messages::start::EgressRule) -> EgressRule {
    use messages::start::Traffic as Told;
    // -1 is any; no other number is negative.
    let any = |number: i16| u8::try_from(number).ok();
    EgressRule {
        destination: rule.destination,
        traffic: match &rule.traffic {
            Told::All => Traffic::All,
            Told::Tcp(ports) => Traffic::Tcp(ports.clone()),
            Told::Udp(ports) => Traffic::Udp(ports.clone()),
            Told::Icmp(kind, code) => Traffic::Icmp(any(*kind), any(*code)),
        },
        log: rule.log,
    }
}

/// A step of the start failed: the words of `droplet.exited`.
pub(super) fn failed(why: impl Into<Box<dyn Error>>) -> End {
    End::Failed(chain(&*why.into()))
}

impl From<Interrupt> for End {
    fn from(interrupt: Interrupt) -> Self {
        match interrupt {
            Interrupt::Stop => Self::Stop,
            Interrupt::Ended => Self::Ended,
            Interrupt::OutOfMemory => Self::OutOfMemory,
        }
    }
}
