//! A steady load from inside a pod while something else happens to the cluster.

use std::{
    io::Read as _,
    process::Child,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use turnpike_cluster::kubectl::Kubectl;

/// Twenty requests a second in series of twenty, for five minutes at most. Each line is a status and
/// when it came.
const SCRIPT: &str = r#"
rm -f /tmp/stop
for series in $(seq 300); do
  [ -e /tmp/stop ] && exit 0
  curl -s -o /dev/null --rate 20/s --max-time 10 -w '%{http_code} %{errormsg}\n' "$0?[1-20]"
done
"#;

/// Requests that go on until [`stop`](Self::stop).
#[derive(Debug)]
pub(crate) struct Load {
    kubectl: Kubectl,
    place: (String, String),
    child: Child,
    said: JoinHandle<String>,
    begun: Instant,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) total: usize,
    /// Those that were not answered 200, as curl tells them.
    pub(crate) failed: Vec<String>,
}

impl Load {
    /// Calls `url` from the container `curl` of a pod.
    pub(crate) fn start(kubectl: &Kubectl, namespace: &str, pod: &str, url: &str) -> Result<Self> {
        let mut child = kubectl.spawn(&[
            "-n", namespace, "exec", pod, "-c", "curl", "--", "sh", "-c", SCRIPT, url,
        ])?;
        let mut out = child
            .stdout
            .take()
            .context("standard output was asked for")?;
        let said = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = out.read_to_string(&mut text);
            text
        });
        Ok(Self {
            kubectl: kubectl.clone(),
            place: (namespace.to_owned(), pod.to_owned()),
            child,
            said,
            begun: Instant::now(),
        })
    }

    pub(crate) fn stop(mut self) -> Result<Outcome> {
        let (namespace, pod) = &self.place;
        self.kubectl
            .exec(namespace, &format!("{pod}/curl"), &["touch", "/tmp/stop"])?;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                bail!("the load did not end");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let said = self.said.join().unwrap_or_default();
        let outcome = Outcome {
            total: said.lines().count(),
            failed: said
                .lines()
                .filter(|line| !line.starts_with("200"))
                .map(str::to_owned)
                .collect(),
        };
        // A fifth of what was meant: two cores carry two nodes, and perhaps a build.
        let least = usize::try_from(self.begun.elapsed().as_secs() * 4)?;
        ensure!(
            outcome.total >= least,
            "{} requests only, of at least {least}: {said}",
            outcome.total
        );
        Ok(outcome)
    }

    /// As [`stop`](Self::stop), and all of them were answered 200.
    pub(crate) fn stop_unharmed(self) -> Result<usize> {
        let outcome = self.stop()?;
        ensure!(
            outcome.failed.is_empty(),
            "{} of {} requests failed: {:?}",
            outcome.failed.len(),
            outcome.total,
            outcome.failed.iter().take(10).collect::<Vec<_>>()
        );
        Ok(outcome.total)
    }
}
