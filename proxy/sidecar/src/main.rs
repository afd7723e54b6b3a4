//! `turnpike-proxy`: puts the proxy of one pod together and runs it.
//!
//! 1. The settings come from the environment, which injection sets;
//! 2. the control side starts on this thread: certificate, configuration, admin ports;
//! 3. when both have come, the data plane starts on threads of its own, and the pod is ready;
//! 4. SIGTERM: not ready, drain, send what telemetry is left, exit 0; the same with exit 1 when a
//!    task ends that should not, and at once when a worker does.

use std::{
    io::IsTerminal,
    net::IpAddr,
    path::PathBuf,
    pin::pin,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use tokio::sync::watch;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt,
};
use turnpike_daemon::{signals, tasks::Tasks};
use turnpike_rules::{Identity, workload::SelfConfig};
use turnpike_sidecar::{
    DataPlane,
    admin::{Admin, AdminConfig, Phase, SetLevel, State},
    config::Config,
    control::{Control, ControlConfig},
    cores,
    mesh::Mesh,
    telemetry::{
        Own, Telemetry,
        access_log::AccessLog,
        otlp::{self, OtlpConfig},
    },
};
use turnpike_wire::channel::Controller;

/// A request makes some dozens of small allocations, most of which end on the thread that made
/// them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As injection sets it. Every flag is also an environment variable.
#[derive(Debug, Parser)]
#[command(name = "turnpike-proxy", version, about = "The proxy beside a pod")]
struct Args {
    /// host:port of the controller.
    #[arg(long, env = "TURNPIKE_CONTROLLER")]
    controller: String,
    /// The name in the controller's certificate.
    #[arg(
        long,
        env = "TURNPIKE_CONTROLLER_NAME",
        default_value = "turnpike-controller.turnpike-system.svc"
    )]
    controller_name: String,
    /// The pod's service-account token, with audience `istio-ca`.
    #[arg(
        long,
        env = "TURNPIKE_TOKEN_FILE",
        default_value = "/var/run/secrets/turnpike/token/token"
    )]
    token_file: PathBuf,
    /// The mesh's roots.
    #[arg(
        long,
        env = "TURNPIKE_ROOT_FILE",
        default_value = "/var/run/secrets/turnpike/root/root.pem"
    )]
    root_file: PathBuf,
    /// The cluster's name, as the controller has it.
    #[arg(long, env = "TURNPIKE_CLUSTER", default_value = "cluster")]
    cluster: String,
    /// The network's name, as the controller has it.
    #[arg(long, env = "TURNPIKE_NETWORK", default_value = "default")]
    network: String,
    /// The mesh's trust domain.
    #[arg(long, env = "TURNPIKE_TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// Keeps the last state here, so that a restart does without the controller.
    #[arg(long, env = "TURNPIKE_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Threads that carry traffic; unset: as many as the container's CPU limit keeps busy, and one
    /// without a limit.
    #[arg(long, env = "TURNPIKE_WORKERS")]
    workers: Option<usize>,
    /// How long connections may take to finish after SIGTERM, in seconds.
    #[arg(long, env = "TURNPIKE_DRAIN_SECONDS", default_value_t = 20)]
    drain_seconds: u64,
    /// The pod's name.
    #[arg(long, env = "POD_NAME")]
    pod_name: String,
    /// The pod's namespace.
    #[arg(long, env = "POD_NAMESPACE")]
    pod_namespace: String,
    /// The pod's UID, under which the controller knows it.
    #[arg(long, env = "POD_UID")]
    pod_uid: String,
    /// The pod's addresses, with commas between them.
    #[arg(long, env = "POD_IP", value_delimiter = ',')]
    pod_ip: Vec<IpAddr>,
    /// The pod's node, for telemetry.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    node_name: String,
    /// The pod's service account: its identity.
    #[arg(long, env = "SERVICE_ACCOUNT")]
    service_account: String,
    /// Where spans and metrics go over OTLP (gRPC); nowhere without it.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// Sent with them: name=value, with commas between.
    #[arg(
        long,
        env = "OTEL_EXPORTER_OTLP_HEADERS",
        default_value = "",
        hide_env_values = true
    )]
    otlp_headers: String,
    /// How often metrics go there, in milliseconds.
    #[arg(long, env = "OTEL_METRIC_EXPORT_INTERVAL", default_value_t = 15_000)]
    otlp_interval_ms: u64,
    /// The form of the program's own log.
    #[arg(long, env = "TURNPIKE_LOG", value_enum, default_value = "text")]
    log: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// What was typed, valid.
struct Settings {
    control: ControlConfig,
    data_plane: Config,
    drain: Duration,
    pod: Pod,
    /// Without the resource, which the controller has to name.
    otlp: Option<OtlpConfig>,
    json_log: bool,
}

/// For the attributes of exported telemetry.
struct Pod {
    name: String,
    namespace: String,
    uid: String,
    node: String,
}

impl TryFrom<Args> for Settings {
    type Error = anyhow::Error;

    fn try_from(args: Args) -> anyhow::Result<Self> {
        let Args {
            controller,
            controller_name,
            token_file,
            root_file,
            cluster,
            network,
            trust_domain,
            state_dir,
            workers,
            drain_seconds,
            pod_name,
            pod_namespace,
            pod_uid,
            pod_ip,
            node_name,
            service_account,
            otlp_endpoint,
            otlp_headers,
            otlp_interval_ms,
            log,
        } = args;
        let identity = Identity::new(trust_domain, pod_namespace.as_str(), service_account)
            .context("TURNPIKE_TRUST_DOMAIN, POD_NAMESPACE and SERVICE_ACCOUNT")?;
        anyhow::ensure!(!pod_uid.is_empty(), "POD_UID is empty; injection sets it");
        anyhow::ensure!(
            otlp_interval_ms > 0,
            "OTEL_METRIC_EXPORT_INTERVAL must be above 0"
        );
        let otlp = otlp_endpoint.filter(|endpoint| !endpoint.is_empty());
        let headers = otlp::headers(&otlp_headers)?;
        Ok(Self {
            control: ControlConfig {
                controller: Controller {
                    address: controller,
                    server_name: controller_name,
                    root_file,
                    token_file,
                },
                cluster,
                network,
                pod_uid: pod_uid.clone(),
                identity,
                state_dir,
            },
            data_plane: Config {
                pod_addresses: pod_ip,
                workers: workers.or_else(cores::limit).unwrap_or(1),
                ..Config::default()
            },
            drain: Duration::from_secs(drain_seconds),
            pod: Pod {
                name: pod_name,
                namespace: pod_namespace,
                uid: pod_uid,
                node: node_name,
            },
            otlp: otlp.map(|endpoint| OtlpConfig {
                endpoint,
                interval: Duration::from_millis(otlp_interval_ms),
                headers,
                resource: Vec::new(),
            }),
            json_log: log == LogFormat::Json,
        })
    }
}

fn main() -> ExitCode {
    let run = || {
        let settings = Settings::try_from(Args::parse())?;
        let set_level = start_log(settings.json_log)?;
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the control thread")?
            .block_on(run(settings, set_level))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("turnpike-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// For the last metrics: a Job ends with its sidecar, and must not wait for a collector that is
/// away.
const LAST_EXPORT: Duration = Duration::from_secs(2);

async fn run(settings: Settings, set_level: SetLevel) -> anyhow::Result<()> {
    let Settings {
        control,
        data_plane,
        drain,
        pod,
        otlp,
        json_log: _,
    } = settings;
    let cluster = control.cluster.clone();
    let mut told_to_end = pin!(signals::told_to_end()?);
    let admin = Admin::bind(&AdminConfig::default())?;
    let mut control = Control::start(control);
    let state = Arc::new(State {
        store: control.store().clone(),
        credentials: control.credentials().clone(),
        telemetry: OnceLock::new(),
        phase: watch::Sender::new(Phase::Starting),
        set_level,
    });
    let mut tasks = Tasks::default();
    tasks.spawn("admin", admin.serve(state.clone()));

    let ready = control.ready();
    let own = tokio::select! {
        own = ready => own,
        ended = tasks.ended() => return Err(ended.into()),
        ended = control.ended() => return Err(ended.into()),
        () = &mut told_to_end => return Ok(()),
    };
    let exports = otlp.map(|config| OtlpConfig {
        resource: resource(&own, &pod),
        ..config
    });
    let telemetry = start_telemetry(&own, &cluster, exports.clone(), &mut tasks)?;
    // Set once: this function runs once.
    let _ = state.telemetry.set(telemetry.clone());
    let credentials = control.credentials().clone();
    let mesh = Mesh::new(
        own,
        Arc::new(control.store().clone()),
        credentials,
        &cluster,
    );
    let mut traffic = DataPlane::start(data_plane, mesh, telemetry.clone())?;
    state.phase.send_replace(Phase::Serving);
    tracing::info!(pod = pod.name, namespace = pod.namespace, "serving");

    let ended = tokio::select! {
        () = &mut told_to_end => Ok(()),
        ended = tasks.ended() => Err(ended),
        ended = control.ended() => Err(ended),
        // Its connections are gone, and nobody may be left to take new ones: at once.
        ended = traffic.ended() => return Err(ended.into()),
    };
    state.phase.send_replace(match &ended {
        Ok(()) => Phase::Draining,
        Err(ended) => Phase::Failed(ended.task),
    });
    if let Err(ended) = &ended {
        tracing::error!(%ended, "ending, to be started anew");
    }
    tracing::info!(deadline_s = drain.as_secs(), "draining");
    traffic.drain(drain).await;
    if let Some(exports) = exports {
        let last = otlp::push_metrics_now(exports, &telemetry);
        tokio::time::timeout(LAST_EXPORT, last).await.ok();
    }
    tokio::task::spawn_blocking(move || telemetry.flush()).await?;
    Ok(ended?)
}

fn start_telemetry(
    own: &watch::Receiver<Arc<SelfConfig>>,
    cluster: &str,
    exports: Option<OtlpConfig>,
    tasks: &mut Tasks,
) -> anyhow::Result<Arc<Telemetry>> {
    let log = AccessLog::start(std::io::stdout()).context("starting the access log")?;
    tasks.spawn("access log", log.clone().ended());
    let provider = exports.as_ref().map(otlp::tracer_provider).transpose();
    // A pod does not stand still for want of telemetry.
    let provider = provider.unwrap_or_else(|error| {
        tracing::error!(%error, "spans are not exported");
        None
    });
    let labels = Own::new(&own.borrow(), cluster);
    let telemetry = Telemetry::new(labels, log, provider);
    telemetry.configure(&own.borrow().telemetry);
    tasks.spawn("telemetry settings", telemetry.clone().follow(own.clone()));
    if let Some(exports) = exports {
        let telemetry = telemetry.clone();
        tasks.spawn("metrics export", async move {
            if let Err(error) = otlp::push_metrics(exports, telemetry).await {
                tracing::warn!(%error, "metrics are not exported");
                std::future::pending::<()>().await;
            }
        });
    }
    Ok(telemetry)
}

/// Source: <https://opentelemetry.io/docs/specs/semconv/resource/k8s/>.
fn resource(own: &watch::Receiver<Arc<SelfConfig>>, pod: &Pod) -> Vec<(&'static str, String)> {
    let Pod {
        name,
        namespace,
        uid,
        node,
    } = pod;
    let workload = own.borrow().names.workload.to_string();
    let service = if workload.is_empty() {
        name.clone()
    } else {
        workload
    };
    vec![
        ("service.name", service),
        ("service.namespace", namespace.clone()),
        ("service.instance.id", uid.clone()),
        ("k8s.namespace.name", namespace.clone()),
        ("k8s.pod.name", name.clone()),
        ("k8s.pod.uid", uid.clone()),
        ("k8s.node.name", node.clone()),
    ]
}

/// Logs to standard error; standard output is the access log's.
fn start_log(json: bool) -> anyhow::Result<SetLevel> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, handle) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = if json {
        lines.json().with_filter(filter).boxed()
    } else {
        lines.with_filter(filter).boxed()
    };
    tracing_subscriber::registry()
        .with(lines)
        .try_init()
        .context("starting the log")?;
    Ok(Box::new(move |level| {
        let filter = EnvFilter::try_new(level).map_err(|error| error.to_string())?;
        handle.reload(filter).map_err(|error| error.to_string())
    }))
}
