//! What the runtime says: environment and standard input, checked before anything happens.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::{
    error::{CniError, Code},
    previous,
};

/// Versions of the specification whose configurations are understood.
pub const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
pub const NEWEST: &str = "1.1.0";

/// Standard input beyond this is not a configuration.
pub const INPUT_LIMIT: u64 = 1 << 20;

const DEFAULT_SOCKET: &str = "/run/turnpike/cni.sock";

/// The variables of the specification, as they are set.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub command: Option<String>,
    pub container_id: Option<String>,
    pub netns: Option<String>,
    pub ifname: Option<String>,
    pub args: Option<String>,
}

impl Environment {
    pub fn read() -> Self {
        let variable = |name| std::env::var(name).ok();
        Self {
            command: variable("CNI_COMMAND"),
            container_id: variable("CNI_CONTAINERID"),
            netns: variable("CNI_NETNS"),
            ifname: variable("CNI_IFNAME"),
            args: variable("CNI_ARGS"),
        }
    }
}

/// A command that is well formed.
#[derive(Clone, Debug)]
pub struct Invocation {
    pub command: Command,
    /// What the answer has to be shaped for.
    pub cni_version: String,
    pub config: Config,
}

#[derive(Clone, Debug)]
pub enum Command {
    Add(Attachment),
    Del(Attachment),
    /// With the addresses that the interface has by ADD's result.
    Check(Attachment, Vec<IpAddr>),
    Status,
    Gc(Vec<ValidAttachment>),
    Version,
}

/// One container's one interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    pub container_id: String,
    pub ifname: String,
    /// Empty on a DEL whose namespace is gone.
    pub netns: String,
    pub pod_namespace: String,
    pub pod_name: String,
    /// Empty where the runtime does not say.
    pub pod_uid: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub container_id: String,
    pub ifname: String,
}

/// The part of the network configuration that matters here.
#[derive(Clone, Debug)]
pub struct Config {
    pub name: String,
    pub agent_socket: PathBuf,
    /// In place of each command's own deadline.
    pub timeout: Option<Duration>,
    pub previous: Option<Value>,
}

/// The configuration as typed: an entry of a conflist, with what the runtime adds to it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TypedConfig {
    cni_version: String,
    name: String,
    #[serde(rename = "type")]
    _plugin: String,
    agent_socket: Option<PathBuf>,
    timeout_seconds: Option<u64>,
    prev_result: Option<Value>,
    /// `None`: the key is not there.
    #[serde(
        rename = "cni.dev/valid-attachments",
        deserialize_with = "null_is_empty"
    )]
    valid_attachments: Option<Vec<ValidAttachment>>,
    #[serde(rename = "runtimeConfig")]
    _runtime_config: Value,
    #[serde(rename = "capabilities")]
    _capabilities: Value,
    #[serde(rename = "args")]
    _args: Value,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// A list without elements is `null` where a runtime in Go never made one.
fn null_is_empty<'de, D: Deserializer<'de>>(
    value: D,
) -> Result<Option<Vec<ValidAttachment>>, D::Error> {
    let list = Option::<Vec<ValidAttachment>>::deserialize(value)?;
    Ok(Some(list.unwrap_or_default()))
}

/// Reads all of it. Only VERSION is answered without a whole configuration.
pub fn parse(environment: &Environment, stdin: &[u8]) -> Result<Invocation, CniError> {
    let word = environment.command.as_deref().unwrap_or_default();
    if !["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"].contains(&word) {
        return Err(invalid_environment(format!(
            "CNI_COMMAND is `{word}`: expected ADD, DEL, CHECK, STATUS, GC or VERSION"
        )));
    }
    if word == "VERSION" && stdin.trim_ascii().is_empty() {
        return Ok(version_asked(NEWEST.to_owned()));
    }
    let typed = decode(stdin)?;
    let version = typed.cni_version.clone();
    let invocation = if word == "VERSION" {
        Ok(version_asked(if version.is_empty() {
            NEWEST.to_owned()
        } else {
            version.clone()
        }))
    } else {
        validate(word, environment, typed)
    };
    invocation.map_err(|error| match VERSIONS.contains(&version.as_str()) {
        true => error.for_version(&version),
        false => error,
    })
}

fn decode(stdin: &[u8]) -> Result<TypedConfig, CniError> {
    if stdin.len() as u64 > INPUT_LIMIT {
        let message = format!("standard input is longer than {INPUT_LIMIT} bytes");
        return Err(CniError::new(Code::DECODE, message, ""));
    }
    let value: Value = serde_json::from_slice(stdin).map_err(|error| {
        CniError::new(
            Code::DECODE,
            "the network configuration is not JSON",
            error.to_string(),
        )
    })?;
    serde_json::from_value(value).map_err(|error| {
        let message = "the network configuration is malformed";
        CniError::new(Code::INVALID_CONFIG, message, error.to_string())
    })
}

fn version_asked(cni_version: String) -> Invocation {
    let config = Config {
        name: String::new(),
        agent_socket: DEFAULT_SOCKET.into(),
        timeout: None,
        previous: None,
    };
    Invocation {
        command: Command::Version,
        cni_version,
        config,
    }
}

fn validate(
    word: &str,
    environment: &Environment,
    typed: TypedConfig,
) -> Result<Invocation, CniError> {
    let TypedConfig {
        cni_version,
        name,
        agent_socket,
        timeout_seconds,
        prev_result,
        ..
    } = &typed;
    check_version(word, cni_version)?;
    // What was set up under another configuration must still come down.
    if !matches!(word, "DEL" | "GC") {
        check_fields(&typed.others)?;
    }
    if !is_identifier(name) {
        return Err(invalid_config(format!(
            "`name` is `{name}`: expected a letter or digit, then letters, digits, `_`, `.` or `-`"
        )));
    }
    let agent_socket = agent_socket
        .clone()
        .unwrap_or_else(|| DEFAULT_SOCKET.into());
    if !agent_socket.is_absolute() {
        let socket = agent_socket.display();
        return Err(invalid_config(format!(
            "`agentSocket` is `{socket}`: expected a full path"
        )));
    }
    if let Some(seconds) = timeout_seconds.filter(|seconds| !(1..=600).contains(seconds)) {
        return Err(invalid_config(format!(
            "`timeoutSeconds` is {seconds}: expected 1 to 600"
        )));
    }
    let command = match word {
        "ADD" => Command::Add(attachment(environment)?),
        "CHECK" => check(environment, &typed)?,
        "DEL" => Command::Del(detachment(environment)?),
        "GC" => Command::Gc(valid_attachments(&typed)?),
        _ => Command::Status,
    };
    let config = Config {
        name: name.clone(),
        agent_socket,
        timeout: timeout_seconds.map(Duration::from_secs),
        previous: prev_result.clone().filter(Value::is_object),
    };
    Ok(Invocation {
        command,
        cni_version: cni_version.clone(),
        config,
    })
}

fn check(environment: &Environment, typed: &TypedConfig) -> Result<Command, CniError> {
    let attachment = attachment(environment)?;
    let Some(previous) = &typed.prev_result else {
        return Err(invalid_config(
            "CHECK needs `prevResult`, the result of the ADD that it is about".to_owned(),
        ));
    };
    let addresses = previous::addresses(previous, &attachment.ifname).map_err(invalid_config)?;
    Ok(Command::Check(attachment, addresses))
}

/// What still lives. A runtime that does not say is not taken to mean that nothing does.
fn valid_attachments(typed: &TypedConfig) -> Result<Vec<ValidAttachment>, CniError> {
    typed.valid_attachments.clone().ok_or_else(|| {
        invalid_config(
            "GC needs `cni.dev/valid-attachments`: without it every pod would lose its network; an              empty list says that none is left"
                .to_owned(),
        )
    })
}

fn check_version(word: &str, version: &str) -> Result<(), CniError> {
    let refused = |message: String| {
        let details = format!("supported: {}", VERSIONS.join(", "));
        Err(CniError::new(Code::INCOMPATIBLE_VERSION, message, details))
    };
    if !VERSIONS.contains(&version) {
        return refused(format!(
            "`cniVersion` is `{version}`, which is not supported"
        ));
    }
    if matches!(word, "STATUS" | "GC") && version != NEWEST {
        return refused(format!(
            "{word} needs `cniVersion` 1.1.0, the configuration has {version}"
        ));
    }
    Ok(())
}

/// A field that would be ignored is a wish that would be. Those of runtimes begin with `cni.dev/`.
fn check_fields(others: &BTreeMap<String, Value>) -> Result<(), CniError> {
    let empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    let strange = others
        .iter()
        .find(|(key, value)| !key.starts_with("cni.dev/") && !empty(value));
    strange.map_or(Ok(()), |(key, value)| {
        let message = format!("the field `{key}` with the value {value} is not supported");
        let details = "supported: cniVersion, name, type, agentSocket, timeoutSeconds";
        Err(CniError::new(Code::UNSUPPORTED_FIELD, message, details))
    })
}

fn attachment(environment: &Environment) -> Result<Attachment, CniError> {
    let mut attachment = interface(environment)?;
    attachment.netns = required("CNI_NETNS", environment.netns.as_deref())?;
    if !Path::new(&attachment.netns).exists() {
        let message = format!("CNI_NETNS is {}, which does not exist", attachment.netns);
        return Err(CniError::new(Code::UNKNOWN_CONTAINER, message, ""));
    }
    let pod = arguments(environment.args.as_deref().unwrap_or_default())?;
    let of_pod = |key: &str| match pod.get(key) {
        Some(value) if !value.is_empty() => Ok((*value).to_owned()),
        _ => Err(invalid_environment(format!("CNI_ARGS lacks {key}"))),
    };
    attachment.pod_namespace = of_pod("K8S_POD_NAMESPACE")?;
    attachment.pod_name = of_pod("K8S_POD_NAME")?;
    attachment.pod_uid = pod
        .get("K8S_POD_UID")
        .copied()
        .unwrap_or_default()
        .to_owned();
    Ok(attachment)
}

/// As little as a removal needs: container and interface.
fn detachment(environment: &Environment) -> Result<Attachment, CniError> {
    let mut attachment = interface(environment)?;
    attachment.netns = environment.netns.clone().unwrap_or_default();
    let pod = arguments(environment.args.as_deref().unwrap_or_default()).unwrap_or_default();
    let of_pod = |key: &str| pod.get(key).copied().unwrap_or_default().to_owned();
    attachment.pod_namespace = of_pod("K8S_POD_NAMESPACE");
    attachment.pod_name = of_pod("K8S_POD_NAME");
    Ok(attachment)
}

fn interface(environment: &Environment) -> Result<Attachment, CniError> {
    let container_id = required("CNI_CONTAINERID", environment.container_id.as_deref())?;
    // It becomes part of a file's name.
    if !is_identifier(&container_id) || container_id.len() > 200 {
        return Err(invalid_environment(format!(
            "CNI_CONTAINERID is `{container_id}`: expected up to 200 letters, digits, `_`, `.`, `-`"
        )));
    }
    let ifname = required("CNI_IFNAME", environment.ifname.as_deref())?;
    let misfit = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if ifname.len() > 15 || ifname == "." || ifname == ".." || ifname.contains(misfit) {
        return Err(invalid_environment(format!(
            "CNI_IFNAME is `{ifname}`: expected up to 15 characters without `/`, `:` and spaces"
        )));
    }
    Ok(Attachment {
        container_id,
        ifname,
        ..Attachment::default()
    })
}

fn required(name: &str, value: Option<&str>) -> Result<String, CniError> {
    let value = value.filter(|value| !value.is_empty());
    value
        .map(str::to_owned)
        .ok_or_else(|| invalid_environment(format!("{name} is not set")))
}

/// `KEY=value;KEY=value`.
fn arguments(text: &str) -> Result<BTreeMap<&str, &str>, CniError> {
    let pairs = text.split(';').filter(|pair| !pair.is_empty());
    let split = pairs.map(|pair| {
        let misfit = || format!("CNI_ARGS has `{pair}`: expected KEY=value pairs with `;` between");
        pair.split_once('=')
            .ok_or_else(|| invalid_environment(misfit()))
    });
    split.collect()
}

/// The specification's form of a name.
fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn invalid_environment(message: String) -> CniError {
    CniError::new(Code::INVALID_ENVIRONMENT, message, "")
}

fn invalid_config(message: String) -> CniError {
    CniError::new(Code::INVALID_CONFIG, message, "")
}
