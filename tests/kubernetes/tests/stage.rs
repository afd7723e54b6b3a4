//! The cluster that all subjects share, and what they ask of it again and again.

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Failed;
use turnpike_cluster::{Cluster, Options, Said, chart, kubectl::Kubectl};
use turnpike_rig::{traces::Traces, wait_for, world::Turn};

use crate::leftovers::nothing_of;

const NAME: &str = "tpt-kube";
/// Subjects that share the namespaces of [`crate::roads`] are one group.
const SHARING: [&str; 3] = ["1", "2", "3"];

pub(crate) type Test = fn(&mut Cluster) -> Result<()>;

/// Long enough for a pod to be made, scheduled, started and ready on two busy cores.
pub(crate) const SOON: Duration = Duration::from_secs(90);
/// For policy to take effect everywhere.
pub(crate) const EFFECT: Duration = Duration::from_secs(45);

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Dark,
    Lit(Box<Cluster>),
    /// It did not come up: every subject says so.
    Failed(String),
}

thread_local! {
    /// Subjects run one after the other on the main thread, which alone may hold the machine's turn.
    static STAGE: RefCell<Stage> = RefCell::default();
    /// What the machine had of the cluster's name before there was one.
    static BEFORE: RefCell<Option<Traces>> = RefCell::default();
    /// Whose namespaces are there.
    static GROUP: RefCell<Option<String>> = RefCell::default();
}

/// Runs one subject, on a cluster that is brought up for the first.
pub(crate) fn run(name: &str, test: Test) -> Result<(), Failed> {
    STAGE.with_borrow_mut(|stage| {
        if matches!(stage, Stage::Dark) {
            *stage = light();
        }
        match stage {
            Stage::Lit(cluster) => show(cluster, name, test),
            Stage::Failed(why) => Err(why.as_str().into()),
            Stage::Dark => Err("no cluster".into()),
        }
    })
}

/// Takes the cluster down.
pub(crate) fn down() {
    STAGE.take();
}

/// Takes the cluster down, and looks for what is left of it.
pub(crate) fn leaves_nothing() -> Result<(), Failed> {
    alone(|| {
        let before = BEFORE
            .take()
            .context("no cluster was brought up: run this with another")?;
        nothing_of(NAME, &before)
    })
}

/// Runs something that wants the machine to itself.
pub(crate) fn alone(test: fn() -> Result<()>) -> Result<(), Failed> {
    down();
    test().map_err(|error| format!("{error:#}").into())
}

fn show(cluster: &mut Cluster, name: &str, test: Test) -> Result<(), Failed> {
    let group = Some(group_of(name).to_owned());
    let last = GROUP.replace(group.clone());
    if last.is_some() && last != group {
        sweep(&cluster.kubectl).map_err(|error| format!("sweeping before it: {error:#}"))?;
    }
    let begun = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| test(cluster)))
        .unwrap_or_else(|panic| Err(anyhow::anyhow!("{}", said_by(&*panic))));
    eprintln!("    {name}: {:.1} s", begun.elapsed().as_secs_f64());
    result.map_err(|error| {
        eprintln!("{error:#}\n{}", explain(cluster));
        if let Err(error) = restore(cluster) {
            eprintln!("what follows may fail by what {name} left: {error:#}");
        }
        format!("{error:#}").into()
    })
}

/// What comes before the first `_`.
fn group_of(name: &str) -> &str {
    let group = name.split('_').next().unwrap_or(name);
    if SHARING.contains(&group) {
        SHARING[0]
    } else {
        group
    }
}

/// After a failure: nothing of its subject is there, and Turnpike is as it was installed.
fn restore(cluster: &Cluster) -> Result<()> {
    sweep(&cluster.kubectl)?;
    let said = cluster.helm_install("upgrade", &chart::values())?;
    ensure!(said.ok, "helm upgrade: {}", said.all().trim());
    let line = ["scale", "deploy/turnpike-controller", "--replicas=1"];
    let namespace = ["-n", chart::NAMESPACE];
    cluster.kubectl.ok(&[&namespace[..], &line].concat())?;
    cluster.rolled_out()
}

/// Deletes what a group of subjects made: the smaller node has room for seventeen pods. Within a
/// group a cast that stands is used again.
fn sweep(kubectl: &Kubectl) -> Result<()> {
    const CLUSTERS_OWN: [&str; 5] = [
        "default",
        "kube-system",
        "kube-public",
        "kube-node-lease",
        chart::NAMESPACE,
    ];
    let list = kubectl.ok(&["get", "namespaces", "-o", "name"])?;
    let names = list
        .lines()
        .filter_map(|line| line.strip_prefix("namespace/"));
    let ours: Vec<&str> = names.filter(|name| !CLUSTERS_OWN.contains(name)).collect();
    if !ours.is_empty() {
        let line = ["delete", "namespace", "--timeout=90s"];
        kubectl.ok(&[&line[..], &ours].concat())?;
    }
    Ok(())
}

fn light() -> Stage {
    let begun = Instant::now();
    let tell = |what: &str| eprintln!("  {:>5.1} s {what}", begun.elapsed().as_secs_f64());
    let turn = match Turn::wait(&tell).and_then(|turn| Cluster::clean(NAME).map(|()| turn)) {
        Ok(turn) => turn,
        Err(error) => return Stage::Failed(format!("cleaning up: {error:#}")),
    };
    BEFORE.set(Some(Traces::of(NAME)));
    let options = Options {
        name: NAME.to_owned(),
        keep: false,
    };
    let lit = Cluster::up_in(turn, options, &tell).and_then(|cluster| {
        if let Err(error) = cluster.install(&chart::values(), &tell) {
            eprintln!("{}", explain(&cluster));
            return Err(error);
        }
        tell("ready");
        Ok(cluster)
    });
    match lit {
        Ok(cluster) => Stage::Lit(Box::new(cluster)),
        Err(error) => Stage::Failed(format!("the cluster did not come up: {error:#}")),
    }
}

/// What a person would look at first.
fn explain(cluster: &Cluster) -> String {
    let show = |arguments: &[&str]| {
        cluster
            .kubectl
            .run(arguments)
            .map_or_else(|e| e.to_string(), |said| said.all())
    };
    let ours = [
        "-n",
        chart::NAMESPACE,
        "logs",
        "--prefix",
        "--all-containers",
        "--tail=25",
        "-l",
    ];
    let mut text = String::new();
    for (title, what) in [
        ("nodes", show(&["get", "nodes", "-o", "wide"])),
        ("pods", show(&["get", "pods", "-A", "-o", "wide"])),
        (
            "events",
            show(&["get", "events", "-A", "--sort-by=.lastTimestamp"])
                .lines()
                .rev()
                .take(40)
                .collect::<Vec<_>>()
                .join("\n"),
        ),
        (
            "Turnpike",
            show(&[&ours[..], &["app.kubernetes.io/name=turnpike"]].concat()),
        ),
        ("programs", cluster.logs()),
    ] {
        text.push_str(&format!("════ {title}\n{what}\n"));
    }
    text
}

fn said_by(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("it panicked")
        .to_owned()
}

/// One call from a pod: quiet, at most five seconds, the status on standard output.
pub(crate) fn curl(
    kubectl: &Kubectl,
    namespace: &str,
    pod: &str,
    arguments: &[&str],
) -> Result<Said> {
    let mut line = vec![
        "curl",
        "-s",
        "-k",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "5",
    ];
    line.extend(arguments);
    kubectl.exec(namespace, &format!("{pod}/curl"), &line)
}

/// Whether a call is answered 200.
pub(crate) fn passes(
    kubectl: &Kubectl,
    namespace: &str,
    pod: &str,
    arguments: &[&str],
) -> Result<bool> {
    Ok(curl(kubectl, namespace, pod, arguments)?.out == "200")
}

/// Fails unless a call is refused: curl ran, and was cut off before any answer or answered 403 or
/// 503. A call that nothing answers meets an outage, not a refusal.
pub(crate) fn refused(
    kubectl: &Kubectl,
    namespace: &str,
    pod: &str,
    arguments: &[&str],
) -> Result<()> {
    let said = curl(kubectl, namespace, pod, arguments)?;
    let what = format!("{namespace}/{pod} → {arguments:?}");
    ensure!(said.out != "200", "{what} passed");
    ensure!(is_refusal(&said), "{what} is not refused: {said:?}");
    Ok(())
}

/// By curl's exit: the TLS handshake failed, nothing came, or the connection was reset.
pub(crate) fn is_refusal(said: &Said) -> bool {
    match said.code {
        Some(35 | 52 | 56) => said.out == "000",
        Some(0) => matches!(said.out.as_str(), "403" | "503"),
        _ => false,
    }
}

/// Calls until it is answered 200.
pub(crate) fn passes_soon(kubectl: &Kubectl, namespace: &str, pod: &str, url: &str) -> Result<()> {
    let mut last = None;
    let passed = wait_for(EFFECT, || {
        let said = curl(kubectl, namespace, pod, &[url]).ok()?;
        let passed = said.out == "200";
        last = Some(said);
        passed.then_some(())
    });
    ensure!(passed.is_some(), "{namespace}/{pod} → {url}: {last:?}");
    Ok(())
}

/// Asks again until it holds; fails with what was asked.
pub(crate) fn soon(
    limit: Duration,
    what: &str,
    mut ask: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let mut last = None;
    let held = wait_for(limit, || match ask() {
        Ok(true) => Some(()),
        Ok(false) => None,
        Err(error) => {
            last = Some(error);
            None
        }
    });
    match (held, last) {
        (Some(()), _) => Ok(()),
        (None, Some(error)) => Err(error).context(format!("not after {limit:?}: {what}")),
        (None, None) => anyhow::bail!("not after {limit:?}: {what}"),
    }
}
