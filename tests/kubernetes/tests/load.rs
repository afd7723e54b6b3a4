//! A steady load from inside a pod while something else happens to the cluster.

use std::{
    io::Read as _,
    process::Child,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use turnpike_cluster::kubectl::Kubectl;

/// Twenty requests a second in series of twenty, until it is told to stop. Each line is a status and
/// what curl says of it.
const SCRIPT: &str = r#"
rm -f /tmp/stop
while [ ! -e /tmp/stop ]; do
  curl -s -o /dev/null --rate 20/s --max-time 10 -w '%{http_code} %{errormsg}\n' "$0?[1-20]"
done
exit 0
"#;
/// Fewer a second are no load: half of what is meant, since two cores carry two nodes.
const LEAST: f64 = 10.0;

/// Requests that go on until [`stop`](Self::stop), or until it is dropped.
#[derive(Debug)]
pub(crate) struct Load {
    kubectl: Kubectl,
    place: (String, String),
    child: Child,
    said: Option<JoinHandle<String>>,
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
            said: Some(said),
            begun: Instant::now(),
        })
    }

    pub(crate) fn stop(mut self) -> Result<Outcome> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the load ended by itself, {status}: {}", self.complaint());
        }
        self.tell()?;
        let seconds = self.begun.elapsed().as_secs_f64();
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "the load did not end");
            std::thread::sleep(Duration::from_millis(50));
        };
        ensure!(status.success(), "the load, {status}: {}", self.complaint());
        let said = self.said.take().and_then(|said| said.join().ok());
        let said = said.unwrap_or_default();
        let failed = said.lines().filter(|line| !line.starts_with("200"));
        let outcome = Outcome {
            total: said.lines().count(),
            failed: failed.map(str::to_owned).collect(),
        };
        let least = seconds * LEAST;
        ensure!(
            outcome.total as f64 >= least,
            "{} requests in {seconds:.0} s are no load",
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

    /// What runs in the pod does not end with the kubectl that began it.
    fn tell(&self) -> Result<()> {
        let (namespace, pod) = &self.place;
        let line = ["touch", "/tmp/stop"];
        let said = self
            .kubectl
            .exec(namespace, &format!("{pod}/curl"), &line)?;
        ensure!(said.ok, "telling the load to stop: {}", said.all());
        Ok(())
    }

    fn complaint(&mut self) -> String {
        let mut text = String::new();
        if let Some(error) = &mut self.child.stderr {
            let _ = error.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.tell();
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
