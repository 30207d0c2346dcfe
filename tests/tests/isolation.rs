//! What an app is given, in the end: by the agent, its supervisor, the init and two shells.

use serde_json::json;
use tests::{Droplet, Host};

/// A fact per line: what `/proc` says of a process of the app, the names of its environment, its descriptors.
const SCRIPT: &str = r#"
grep -E '^(Umask|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Sig[BI])' /proc/self/status | tr -s '\t ' ' ' | sed 's, $,,'
grep -E '^Max (core|open)' /proc/self/limits | tr -s ' ' | sed 's, $,,'
echo oom_score_adj $(cat /proc/self/oom_score_adj)
echo working directory $(readlink /proc/self/cwd)
echo environment $(env | sed 's/=.*//' | sort)
exec perl -e '
  $| = 1;
  opendir my $own, "/proc/self/fd";
  for (sort { $a <=> $b } grep { /\d/ && $_ != fileno $own } readdir $own) {
    my $to = readlink "/proc/self/fd/$_";
    $to =~ s/\d{3,}/N/;
    print "descriptor $_: $to\n";
  }
  print "end\n"; sleep 1000;'
"#;

#[tokio::test]
async fn an_app_has_what_the_golden_list_says_and_nothing_else() {
    let mut host = Host::start().await;
    // As systemd starts it.
    host.kill9().await;
    let mut hellos = host.watch("dea.start").await;
    host.spawn_agent_by(&["prlimit", "--core=unlimited"]);
    hellos.next().await;
    let mut output = host.output("golden").await;
    let mut message = host.message("golden", &Droplet::shell(SCRIPT));
    (message["env"], message["services"]) = (json!([]), json!([]));
    host.run(message).await;
    output
        .until("its last line", |output| {
            output.text(0, "stdout").ends_with("end\n")
        })
        .await;
    let path = tests::fixtures().join("hostile/app.vcap");
    let golden = std::fs::read_to_string(&path).unwrap();
    assert_eq!(output.text(0, "stdout"), golden, "{}", path.display());
}
