//! kubectl and helm as a user types them, run on the instance `control`: nothing of the cluster is
//! reached from the machine's own network.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::{Metadata as _, serde::de::DeserializeOwned};
use serde_json::Value;
use turnpike_vpc::netns::{Command, Namespace, Output};

use crate::build::Cache;

/// No command that is not told otherwise takes longer.
const LIMIT: Duration = Duration::from_secs(120);
/// What a command that has a limit of its own is given beyond it, to say so.
const GRACE: Duration = Duration::from_secs(15);

/// What a command said.
#[derive(Clone, Debug)]
pub struct Said {
    pub ok: bool,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    /// Both streams, for a search.
    pub fn all(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// The client of one cluster.
#[derive(Clone, Debug)]
pub struct Kubectl {
    programs: PathBuf,
    control: Namespace,
    kubeconfig: PathBuf,
}

impl Kubectl {
    pub fn new(cache: &Cache, control: &Namespace, kubeconfig: &Path) -> Self {
        Self {
            programs: cache.programs(),
            control: control.clone(),
            kubeconfig: kubeconfig.to_owned(),
        }
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Any kubectl command, to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Said> {
        self.feed("kubectl", arguments, "", LIMIT)
    }

    /// Any kubectl command, which must succeed; what it printed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let said = self.run(arguments)?;
        ensure!(
            said.ok,
            "kubectl {}: {}",
            arguments.join(" "),
            said.all().trim()
        );
        Ok(said.out)
    }

    /// `kubectl apply` of YAML; what it printed, also a refusal.
    pub fn try_apply(&self, yaml: &str) -> Result<Said> {
        self.feed("kubectl", &["apply", "-f", "-"], yaml, LIMIT)
    }

    /// `kubectl create` of an object that is an answer, such as a TokenReview; the answer as JSON.
    pub fn create(&self, yaml: &str) -> Result<Said> {
        let line = ["create", "-o", "json", "-f", "-"];
        self.feed("kubectl", &line, yaml, LIMIT)
    }

    /// What the API server would make of an object, its webhooks included; nothing is kept.
    pub fn dry_run(&self, yaml: &str) -> Result<Said> {
        let line = ["create", "--dry-run=server", "-o", "json", "-f", "-"];
        self.feed("kubectl", &line, yaml, LIMIT)
    }

    pub fn apply(&self, yaml: &str) -> Result<()> {
        let said = self.try_apply(yaml)?;
        ensure!(said.ok, "kubectl apply: {}\nof\n{yaml}", said.all().trim());
        Ok(())
    }

    pub fn helm(&self, arguments: &[&str]) -> Result<Said> {
        self.feed("helm", arguments, "", LIMIT)
    }

    /// One object, typed.
    pub fn get<T>(&self, namespace: &str, name: &str) -> Result<T>
    where
        T: k8s_openapi::Resource + DeserializeOwned,
    {
        let text = self.ok(&["-n", namespace, "get", &kind::<T>(), name, "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("{} {namespace}/{name}", T::KIND))
    }

    /// All objects of a kind that a selector picks, typed.
    pub fn list<T>(&self, namespace: &str, selector: &str) -> Result<Vec<T>>
    where
        T: k8s_openapi::Resource + DeserializeOwned,
    {
        let text = self.ok(&[
            "-n",
            namespace,
            "get",
            &kind::<T>(),
            "-l",
            selector,
            "-o",
            "json",
        ])?;
        let mut list: Value = serde_json::from_str(&text)?;
        let items = list["items"].take();
        serde_json::from_value(items).with_context(|| format!("{} in {namespace}", T::KIND))
    }

    /// Any object, as JSON.
    pub fn json(&self, namespace: &str, what: &[&str]) -> Result<Value> {
        let mut line = vec!["-n", namespace, "get"];
        line.extend(what);
        line.extend(["-o", "json"]);
        Ok(serde_json::from_str(&self.ok(&line)?)?)
    }

    /// Waits until a Deployment, StatefulSet or DaemonSet is rolled out.
    pub fn rolled_out(&self, namespace: &str, what: &str, limit: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        let line = ["-n", namespace, "rollout", "status", what, &timeout];
        let said = self.feed("kubectl", &line, "", limit + GRACE)?;
        if said.ok {
            return Ok(());
        }
        bail!(
            "{what} in {namespace} is not rolled out after {limit:?}: {}\n{}",
            said.all().trim(),
            self.explain(namespace)
        )
    }

    /// Waits for a condition: `kubectl wait --for=…`.
    pub fn wait(
        &self,
        namespace: &str,
        what: &str,
        condition: &str,
        limit: Duration,
    ) -> Result<()> {
        let (condition, timeout) = (
            format!("--for={condition}"),
            format!("--timeout={}s", limit.as_secs()),
        );
        let line = ["-n", namespace, "wait", what, &condition, &timeout];
        let said = self.feed("kubectl", &line, "", limit + GRACE)?;
        if said.ok {
            return Ok(());
        }
        bail!(
            "{what} in {namespace}: {}\n{}",
            said.all().trim(),
            self.explain(namespace)
        )
    }

    /// Runs a command in a pod, in the container that `pod/container` or the pod alone names.
    pub fn exec(&self, namespace: &str, pod: &str, line: &[&str]) -> Result<Said> {
        let (pod, container) = pod
            .split_once('/')
            .map_or((pod, None), |(pod, name)| (pod, Some(name)));
        let mut words = vec!["-n", namespace, "exec", pod];
        words.extend(container.iter().flat_map(|name| ["-c", name]));
        words.push("--");
        words.extend(line);
        self.run(&words)
    }

    /// What a container has written so far.
    pub fn logs(&self, namespace: &str, pod: &str, container: &str) -> Result<String> {
        self.ok(&["-n", namespace, "logs", pod, "-c", container])
    }

    /// A command that goes on by itself, such as port-forward; the caller ends it.
    pub fn spawn(&self, arguments: &[&str]) -> Result<Child> {
        Ok(self
            .command("kubectl", arguments)
            .die_with_parent()
            .stdout(Output::Piped)
            .stderr(Output::Piped)
            .spawn(&self.control)?)
    }

    /// Any program on the instance `control`, e.g. curl to a forwarded port.
    pub fn on_control(&self, line: &[&str]) -> Result<Said> {
        let (program, arguments) = line.split_first().context("an empty command line")?;
        let limit = LIMIT.as_secs().to_string();
        let mut limited = vec![&*limit, *program];
        limited.extend(arguments);
        said(Command::new("timeout").args(limited), &self.control, "")
    }

    /// A namespace's pods and latest events, for a failure.
    pub fn explain(&self, namespace: &str) -> String {
        let show = |arguments: &[&str]| {
            self.run(arguments)
                .map_or_else(|error| error.to_string(), |said| said.all())
        };
        let events = show(&["-n", namespace, "get", "events", "--sort-by=.lastTimestamp"]);
        let last: Vec<&str> = events.lines().rev().take(30).collect();
        format!(
            "{}\n{}",
            show(&["-n", namespace, "get", "pods", "-o", "wide"]),
            last.into_iter().rev().collect::<Vec<_>>().join("\n")
        )
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let home = self.kubeconfig.with_file_name("home");
        Command::new(self.programs.join(program))
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", home)
    }

    fn feed(
        &self,
        program: &str,
        arguments: &[&str],
        input: &str,
        limit: Duration,
    ) -> Result<Said> {
        let path = self.programs.join(program).to_string_lossy().into_owned();
        let limit = limit.as_secs().to_string();
        let mut line = vec![&*limit, &path];
        line.extend(arguments);
        let home = self.kubeconfig.with_file_name("home");
        let command = Command::new("timeout")
            .args(line)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", home);
        said(command, &self.control, input)
    }
}

fn said(command: Command, namespace: &Namespace, input: &str) -> Result<Said> {
    let mut child = command
        .stdin_piped()
        .stdout(Output::Piped)
        .stderr(Output::Piped)
        .spawn(namespace)?;
    let mut stdin = child.stdin.take().context("standard input was asked for")?;
    // One that ends without reading is heard by its status.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    Ok(Said {
        ok: output.status.success(),
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// `deployments.v1.apps`, or `pods` for the core group.
fn kind<T: k8s_openapi::Resource>() -> String {
    if T::GROUP.is_empty() {
        T::KIND.to_lowercase()
    } else {
        format!("{}.{}.{}", T::KIND.to_lowercase(), T::VERSION, T::GROUP)
    }
}

/// A pod's name.
pub fn name_of(pod: &k8s_openapi::api::core::v1::Pod) -> String {
    pod.metadata().name.clone().unwrap_or_default()
}
