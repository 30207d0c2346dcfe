//! What operators have run in containers: in its order, in the app's environment, and never for ever.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tests::{Droplet, Host, Setup};

/// A directory of the host that every container sees at /shared and may write to, and the hooks beside it. To be
/// dropped after the host.
struct Shared(PathBuf);

impl Shared {
    /// The hooks have these names and texts.
    fn new(hooks: &[(&str, &str)]) -> Self {
        let shared =
            Self(std::env::temp_dir().join(format!("ostler-hooks-{}", std::process::id())));
        std::fs::create_dir_all(shared.0.join("shared")).unwrap();
        let anybody = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(shared.0.join("shared"), anybody.clone()).unwrap();
        // Each container has users of its own: what one makes is nobody's to another.
        touch(&shared.path("log"));
        std::fs::set_permissions(shared.path("log"), anybody).unwrap();
        for (name, text) in hooks {
            std::fs::write(shared.0.join(name), text).unwrap();
        }
        shared
    }

    /// A host with these hooks, which may take so many seconds each.
    async fn host(&self, hooks: &[&str], timeout: u64, more: &str) -> Host {
        let files: Vec<String> = hooks
            .iter()
            .map(|hook| format!("{hook} = \"{}\"\n", self.0.join(hook).display()))
            .collect();
        let config = format!(
            "[[bind_mounts]]\nsrc_path = \"{0}\"\ndst_path = \"/shared\"\nmode = \"rw\"\n\
             [[bind_mounts]]\nsrc_path = \"{0}\"\ndst_path = \"/opt/read/only\"\n\
             [hooks]\ntimeout = {timeout}\n{1}{more}\n[network]",
            self.0.join("shared").display(),
            files.concat()
        );
        Host::with(Setup {
            config: &[("[network]", &config)],
            ..Default::default()
        })
        .await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join("shared").join(name)
    }

    /// What was written to the log that all share.
    fn log(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// Waits until the log has a line.
    async fn logged(&self, host: &Host, line: &str) {
        let told = |_: &tests::Tree| self.log().iter().any(|one| one == line);
        host.tree_until(line, told).await;
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const ALL: [&str; 4] = ["before_start", "after_start", "before_stop", "after_stop"];

/// A hook that says that it runs, and hangs deaf to TERM where a file wants that.
fn may_hang(name: &str) -> String {
    format!(
        "echo {name} >> /shared/log\n\
         if [ -e /shared/hang-{name} ]; then trap '' TERM; while :; do sleep 0.1; done; fi\n"
    )
}

fn hanging() -> Shared {
    let texts = ALL.map(may_hang);
    let hooks: Vec<(&str, &str)> = ALL
        .into_iter()
        .zip(texts.iter().map(String::as_str))
        .collect();
    Shared::new(&hooks)
}

/// An empty file.
fn touch(path: &Path) {
    std::fs::write(path, "").unwrap();
}

/// Ends at TERM, and says so.
const APP: &str = "trap 'echo term >> /shared/log; exit 0' TERM\necho app >> /shared/log\nwhile :; do sleep 0.05; done";

#[tokio::test]
async fn hooks_run_in_their_order_with_the_apps_environment_also_under_the_next_agent() {
    let says = "echo $0 $PORT $GREETING $(id -un) $(umask) $PWD $CF_INSTANCE_INDEX >> /shared/log";
    let text = |name: &str| format!("{}\n", says.replace("$0", name));
    // The app may be slower than the hook that follows its start.
    let after = format!(
        "while ! grep -q ^app /shared/log; do sleep 0.05; done\n{}",
        text("after_start")
    );
    let shared = Shared::new(&[
        ("before_start", &text("before_start")),
        ("after_start", &after),
        ("before_stop", &text("before_stop")),
        ("after_stop", &text("after_stop")),
    ]);
    let more = "post_setup = \"export AFTERWARDS=$GREETING-too\"";
    let mut host = shared.host(&ALL, 60, more).await;
    std::fs::write(shared.path("given"), "gift").unwrap();
    let app = "trap 'echo term >> /shared/log; exit 0' TERM\n\
               [ -w /opt/read/only/log ] || ro=ro\n\
               echo app $PORT $AFTERWARDS $ro $(cat /opt/read/only/given) >> /shared/log\nwhile :; do sleep 0.05; done";
    let mut message = host.message("app", &Droplet::shell(app));
    message["env"] = json!(["GREETING=hello"]);
    message["index"] = json!(3);
    host.run(message).await;
    let find = json!({"droplet": "app", "include_stats": true});
    let found = host.request("dea.find.droplet", &find).await;
    let port = found["stats"]["port"].as_u64().unwrap();
    let hook = |name: &str| format!("{name} {port} hello vcap 0077 /home/vcap 3");
    shared.logged(&host, &hook("after_start")).await;
    host.restart().await;
    host.tree_until("app's supervisor alone", |tree| {
        tree.named("iomux-spawn").len() == 1
    })
    .await;
    host.stop("app").await;
    let told = [
        hook("before_start"),
        format!("app {port} hello-too ro gift"),
        hook("after_start"),
        hook("before_stop"),
        "term".to_owned(),
        hook("after_stop"),
    ];
    assert_eq!(shared.log(), told);
}

#[tokio::test]
async fn a_start_fails_with_its_hooks_and_a_stop_does_not() {
    let shared = Shared::new(&[
        (
            "before_start",
            "[ -e /shared/good ] && exit; echo no licence >&2; exit 3",
        ),
        ("after_start", "[ -e /shared/better ]"),
        ("before_stop", "exit 5"),
    ]);
    // The file of after_stop is not there.
    let host = shared.host(&ALL, 60, "").await;
    let mut exits = host.watch("droplet.exited").await;
    let mut unrouted = host.watch("router.unregister").await;
    let start = host.message("app", &Droplet::shell(APP));
    host.publish(&host.subject("start"), &start).await;
    let exit = exits.next().await;
    assert_eq!(
        exit["exit_description"],
        "failed to start: before_start exited with status 3: no licence"
    );
    assert_eq!(exit["reason"], "CRASHED", "{exit}");
    assert_eq!(shared.log(), Vec::<String>::new(), "no app");
    touch(&shared.path("good"));
    host.publish(&host.subject("start"), &start).await;
    let exit = exits.next().await;
    assert_eq!(
        exit["exit_description"],
        "failed to start: after_start exited with status 1"
    );
    assert_eq!(exit["reason"], "CRASHED", "{exit}");
    unrouted.next().await;
    touch(&shared.path("better"));
    host.run(start).await;
    shared.logged(&host, "app").await;
    host.stop("app").await;
    let exit = exits.next().await;
    assert_eq!(exit["reason"], "STOPPED", "{exit}");
    host.logged(0, "exited with status 5").await;
    host.logged(0, "a hook is left out").await;
}

#[tokio::test]
async fn a_stop_waits_for_no_hook_of_a_start() {
    let shared = hanging();
    let mut host = shared.host(&ALL, 3600, "").await;
    let mut exits = host.watch("droplet.exited").await;
    let start = host.message("app", &Droplet::shell(APP));
    touch(&shared.path("hang-before_start"));
    host.publish(&host.subject("start"), &start).await;
    shared.logged(&host, "before_start").await;
    host.stop("app").await;
    assert_eq!(shared.log(), ["before_start"], "there was no app to stop");
    // An agent that finds it hanging begins the start again.
    host.publish(&host.subject("start"), &start).await;
    host.tree_until("another", |_| shared.log().len() == 2)
        .await;
    host.restart().await;
    host.tree_until("once more", |_| shared.log() == ["before_start"; 3])
        .await;
    host.stop("app").await;
    std::fs::remove_file(shared.path("hang-before_start")).unwrap();
    touch(&shared.path("hang-after_start"));
    host.run(start).await;
    shared.logged(&host, "after_start").await;
    host.restart().await;
    host.stop("app").await;
    let ran = shared.log();
    let after = ran.iter().filter(|line| *line == "after_start");
    assert_eq!(after.count(), 1, "{ran:?}");
    for exit in exits.arrived() {
        assert_eq!(exit["reason"], "STOPPED", "{exit}");
    }
}

#[tokio::test]
async fn a_hook_that_hangs_holds_up_no_stop_and_no_shutdown_also_of_the_next_agent() {
    let shared = hanging();
    let grace = "[instance]\nstop_grace = 3";
    let mut host = shared.host(&ALL, 6, grace).await;
    let mut exits = host.watch("droplet.exited").await;
    for hook in ["before_stop", "after_stop"] {
        touch(&shared.path(&format!("hang-{hook}")));
    }
    let start = host.message("app", &Droplet::shell(APP));
    let orderly = [
        "before_start",
        "app",
        "after_start",
        "before_stop",
        "term",
        "after_stop",
    ];
    let sorted = |mut log: Vec<String>| {
        log.sort_unstable();
        log
    };
    let each_once = sorted(orderly.map(str::to_owned).to_vec());
    for cut in ["before_stop", "after_stop", "nothing"] {
        host.run(start.clone()).await;
        shared.logged(&host, "app").await;
        shared.logged(&host, "after_start").await;
        host.publish("dea.stop", &json!({"droplet": "app"})).await;
        if cut != "nothing" {
            shared.logged(&host, cut).await;
            host.restart().await;
        }
        let exit = exits.next().await;
        assert_eq!(exit["reason"], "STOPPED", "{exit}");
        host.tree_until("empty machine", |tree| tree.named("wshd").is_empty())
            .await;
        assert_eq!(sorted(shared.log()), each_once, "cut in {cut}");
        touch(&shared.path("log"));
    }
    // Two at once, in an agent's shutdown.
    for index in 0..2 {
        let mut one = start.clone();
        one["index"] = json!(index);
        host.run(one).await;
    }
    host.tree_until("both", |_| {
        shared.log().iter().filter(|line| *line == "app").count() == 2
    })
    .await;
    let status = host.end(Signal::SIGTERM).await;
    assert!(status.success(), "{status}");
    assert_eq!(host.leftovers(), Vec::<String>::new());
    for _ in 0..2 {
        assert_eq!(exits.next().await["reason"], "DEA_SHUTDOWN");
    }
    assert_eq!(exits.arrived(), Vec::<Value>::new());
}

#[tokio::test]
async fn a_hook_that_an_agent_had_no_time_to_begin_harms_no_app() {
    let shared = Shared::new(&[("after_start", "echo after_start >> /shared/log")]);
    let host = shared.host(&["after_start"], 60, "").await;
    let mut exits = host.watch("droplet.exited").await;
    let app = "while [ ! -e /shared/go ]; do sleep 0.05; done\nexec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 5, LocalPort => $ENV{PORT}) or die; while (1) { $c = $s->accept }'";
    let mut message = host.message("app", &Droplet::shell(app));
    message["uris"] = json!(["app.example.net"]);
    let answer = host.request(&host.subject("start"), &message).await;
    let handle = answer["handle"].as_str().unwrap();
    let jobs = host.base.join("containers").join(handle).join("jobs");
    host.tree_until("app", |tree| {
        tree.0
            .iter()
            .any(|process| process.title() == "bash main.sh")
    })
    .await;
    // As an agent leaves it that is killed between a hook's directory and the hook.
    std::fs::create_dir(jobs.join("3")).unwrap();
    touch(&shared.path("go"));
    host.tree_until("word of it", |_| host.log().contains("is left as it is"))
        .await;
    let found = host
        .request(&host.subject("find"), &json!({"droplet": "app"}))
        .await;
    assert_eq!(found["instances"][0]["state"], "RUNNING", "{found}");
    assert_eq!(exits.arrived(), Vec::<Value>::new());
    assert_eq!(shared.log(), Vec::<String>::new());
    host.stop("app").await;
}
