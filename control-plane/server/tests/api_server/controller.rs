//! The controller as the chart runs it, with the chart's own rights.

use std::{
    fs,
    net::SocketAddr,
    ops::{Deref, DerefMut},
    path::PathBuf,
};

use super::apiserver::ApiServer;
use crate::common::Process;

pub(crate) struct Controller {
    process: Process,
    pub(crate) webhook: SocketAddr,
    kubeconfig: PathBuf,
}

impl Deref for Controller {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Controller {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The namespace, the service account and its rights, by the chart; the CRDs too.
pub(crate) fn install(api: &ApiServer) {
    api.namespace("turnpike-system", "");
    api.apply(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: turnpike-controller, namespace: \
         turnpike-system}\n",
    );
    api.apply(&api.chart(&["rbac.yaml"]));
}

impl Controller {
    /// Started, whether it gets ready or not.
    pub(crate) fn launch(api: &ApiServer) -> Self {
        let process = Process::prepare();
        let args = [
            "create",
            "token",
            "turnpike-controller",
            "--namespace=turnpike-system",
            "--duration=24h",
        ];
        let token = api.kubectl(&args);
        let user = format!("{{token: {}}}", token.trim());
        let webhook = SocketAddr::from((api.host, api.next_webhook_port()));
        let kubeconfig = api.kubeconfig(&format!("controller-{}.conf", webhook.port()), &user);
        fs::write(process.path("inject.yaml"), "image: turnpike/proxy:1\n").unwrap();
        let mut controller = Self {
            process,
            webhook,
            kubeconfig,
        };
        controller.spawn();
        controller
    }

    /// Started, and ready.
    pub(crate) fn start(api: &ApiServer) -> Self {
        let mut controller = Self::launch(api);
        controller.ready();
        controller
    }

    pub(crate) fn spawn(&mut self) {
        let mut command = self.process.executable();
        command
            .args([
                "--source=kubernetes",
                "--tokens=review",
                "--root-secret=turnpike-ca",
                "--listen=127.0.0.1:0",
                "--webhook-configuration=turnpike-injector",
            ])
            .arg(format!("--webhook={}", self.webhook))
            .arg("--inject-config")
            .arg(self.path("inject.yaml"))
            .env("KUBECONFIG", &self.kubeconfig)
            .env(
                "RUST_LOG",
                "info,turnpike_server=debug,turnpike_kubernetes=debug,kube_runtime=error",
            );
        self.process.run(command);
    }

    /// Messages of `/debug/rejections` that are about something.
    pub(crate) fn rejections(&self, about: &str) -> Vec<String> {
        let all = self.json("/debug/rejections");
        let all = all.as_array().unwrap().iter();
        all.map(|entry| {
            let text = |field: &str| entry[field].as_str().unwrap_or_default();
            format!("{} {} {}", text("file"), text("field"), text("message"))
        })
        .filter(|text| text.contains(about))
        .collect()
    }
}
