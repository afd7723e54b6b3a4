//! The little cluster of the story: namespaces, Services and unmodified workloads.

use anyhow::Result;
use turnpike_kubernetes::inject::InjectConfig;

use crate::{
    pods::Workload,
    world::{CONTROL, CONTROLLER_NAME, World},
};

/// Namespaces with whether they are labelled for injection.
pub const NAMESPACES: [(&str, bool); 2] = [("shop", true), ("legacy", false)];

/// Cluster addresses of the Services in `cluster/shop.yaml`.
pub const WEB: &str = "10.96.0.20";
pub const FLAKY: &str = "10.96.0.21";
pub const SLOW: &str = "10.96.0.22";

/// A container that lasts until it is stopped; commands are run beside it.
const WAIT: &[&str] = &["sleep", "infinity"];
const NGINX: &[&str] = &["nginx", "-c", "/run/config/nginx.conf"];

/// nginx as it comes, with a configuration that its pod's files can turn bad:
/// `/run/scratch/broken` answers 503, `/run/scratch/hang` never answers.
/// `failing` is the share of requests, in percent, answered 503 in any case.
pub fn nginx_conf(failing: u32) -> String {
    // nginx refuses a share of 0%.
    let share = if failing == 0 {
        String::new()
    } else {
        format!("{failing}% 1;")
    };
    include_str!("../cluster/nginx.conf.in").replace("@SHARE@", &share)
}

/// A web server's pod.
pub fn nginx<'a>(name: &'a str, app: &'a str, node: &'a str, failing: u32) -> Workload<'a> {
    Workload {
        namespace: "shop",
        name,
        app,
        service_account: app,
        node,
        command: NGINX,
        port: Some(8080),
        files: vec![("nginx.conf", nginx_conf(failing))],
    }
}

/// A pod to run clients in.
pub fn client<'a>(namespace: &'a str, name: &'a str, app: &'a str, node: &'a str) -> Workload<'a> {
    Workload {
        namespace,
        name,
        app,
        service_account: app,
        node,
        command: WAIT,
        port: None,
        files: Vec::new(),
    }
}

impl World {
    /// What injection is told in the box.
    pub fn inject_config(&self) -> InjectConfig {
        InjectConfig {
            controller: format!("{CONTROL}:15012"),
            controller_name: CONTROLLER_NAME.to_owned(),
            otlp_endpoint: Some(self.otlp_endpoint()),
            ..InjectConfig::default()
        }
    }

    /// Adds the story's namespaces, service accounts, Services and their names.
    pub fn furnish(&mut self) -> Result<()> {
        self.directory
            .write("shop", include_str!("../cluster/shop.yaml"))?;
        for (service, address) in [("web", WEB), ("flaky", FLAKY), ("slow", SLOW)] {
            self.name(
                &format!("{service}.shop.svc.cluster.local"),
                &[address.parse()?],
            )?;
        }
        Ok(())
    }
}
