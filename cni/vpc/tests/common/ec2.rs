//! A caller of the EC2 API and of instance metadata, request by request.

use std::{io::Write, net::SocketAddr};

use turnpike_vpc::netns::Namespace;

use super::{Vpc, connect, http};

/// What the API said.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    /// The text of the first element of a name.
    pub(crate) fn get(&self, element: &str) -> Option<String> {
        self.all(element).into_iter().next()
    }

    pub(crate) fn all(&self, element: &str) -> Vec<String> {
        let (open, close) = (format!("<{element}>"), format!("</{element}>"));
        let parts = self.body.split(&open).skip(1);
        parts
            .map(|rest| rest.split(&close).next().unwrap().to_owned())
            .collect()
    }

    pub(crate) fn code(&self) -> String {
        self.get("Code")
            .unwrap_or_else(|| format!("{} {}", self.status, self.body))
    }

    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.status, 200, "{}", self.body);
        self
    }
}

/// A client on an instance with the credentials that its metadata gave.
pub(crate) struct Client {
    namespace: Namespace,
    address: SocketAddr,
    key: String,
    token: String,
}

impl Client {
    pub(crate) fn new(vpc: &Vpc, instance: &str) -> Self {
        let namespace = vpc.namespace(instance);
        let address = vpc
            .ready
            .ec2
            .strip_prefix("http://")
            .unwrap()
            .parse()
            .unwrap();
        let path = "meta-data/iam/security-credentials/turnpike-node";
        let credentials = Metadata::new(namespace.clone()).get(path).unwrap();
        let document: serde_json::Value = serde_json::from_str(&credentials).unwrap();
        let text = |key: &str| document[key].as_str().unwrap().to_owned();
        Self {
            namespace,
            address,
            key: text("AccessKeyId"),
            token: text("Token"),
        }
    }

    pub(crate) fn call(&self, action: &str, params: &[(&str, &str)]) -> Answer {
        self.signed_by(&self.key, &self.token, action, params)
    }

    pub(crate) fn signed_by(
        &self,
        key: &str,
        token: &str,
        action: &str,
        params: &[(&str, &str)],
    ) -> Answer {
        self.send(&self.signature(key, token), action, params)
    }

    fn signature(&self, key: &str, token: &str) -> String {
        let signature = "0".repeat(64);
        format!(
            "Authorization: AWS4-HMAC-SHA256 Credential={key}/20260101/eu-west-1/ec2/aws4_request, \
             SignedHeaders=host;x-amz-date, Signature={signature}\r\nX-Amz-Security-Token: {token}\r\n"
        )
    }

    /// Sends a whole request and hangs up.
    pub(crate) fn call_and_leave(&self, action: &str, params: &[(&str, &str)]) {
        let mut stream = connect(&self.namespace, None, self.address).unwrap();
        let request = self.request(&self.signature(&self.key, &self.token), action, params);
        stream.write_all(request.as_bytes()).unwrap();
    }

    pub(crate) fn send(&self, headers: &str, action: &str, params: &[(&str, &str)]) -> Answer {
        let request = self.request(headers, action, params);
        let (status, body) = http(&self.namespace, self.address, &request).unwrap();
        Answer { status, body }
    }

    fn request(&self, headers: &str, action: &str, params: &[(&str, &str)]) -> String {
        let form = form_urlencoded::Serializer::new(String::new())
            .extend_pairs([("Action", action), ("Version", "2016-11-15")])
            .extend_pairs(params)
            .finish();
        format!(
            "POST / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}Content-Type: \
             application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{form}",
            self.address,
            form.len()
        )
    }

    pub(crate) fn interface(&self, id: &str) -> Answer {
        self.call("DescribeNetworkInterfaces", &[("NetworkInterfaceId.1", id)])
    }

    /// Waits until an interface is described in a state.
    pub(crate) fn settled(&self, id: &str, status: &str) -> Answer {
        super::eventually(&format!("{id} to be {status}"), || {
            let answer = self.interface(id);
            answer
                .all("status")
                .iter()
                .any(|s| s == status)
                .then_some(answer)
        })
    }

    /// A new interface, available.
    pub(crate) fn create(&self, params: &[(&str, &str)]) -> String {
        let answer = self.call("CreateNetworkInterface", params).ok();
        let id = answer.get("networkInterfaceId").unwrap();
        self.settled(&id, "available");
        id
    }

    /// Its own primary interface.
    pub(crate) fn primary(&self, instance: &str) -> String {
        let filters = [
            ("Filter.1.Name", "attachment.instance-id"),
            ("Filter.1.Value.1", instance),
            ("Filter.2.Name", "attachment.device-index"),
            ("Filter.2.Value.1", "0"),
        ];
        let answer = self.call("DescribeNetworkInterfaces", &filters).ok();
        answer.get("networkInterfaceId").unwrap()
    }

    /// So many secondary addresses for an interface.
    pub(crate) fn assign(&self, interface: &str, count: usize) -> Vec<String> {
        let count = count.to_string();
        let params = [
            ("NetworkInterfaceId", interface),
            ("SecondaryPrivateIpAddressCount", &count),
        ];
        self.call("AssignPrivateIpAddresses", &params)
            .ok()
            .all("privateIpAddress")
    }
}

pub(crate) struct Metadata {
    namespace: Namespace,
    pub(crate) address: SocketAddr,
}

impl Metadata {
    pub(crate) fn new(namespace: Namespace) -> Self {
        Self {
            namespace,
            address: "169.254.169.254:80".parse().unwrap(),
        }
    }

    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &str,
    ) -> std::io::Result<(u16, String)> {
        let request = format!(
            "{method} /latest/{path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\
             {headers}\r\n"
        );
        http(&self.namespace, self.address, &request)
    }

    pub(crate) fn token(&self, seconds: &str) -> (u16, String) {
        let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {seconds}\r\n");
        self.request("PUT", "api/token", &ttl).unwrap()
    }

    /// What is there under a path, with a token of its own.
    pub(crate) fn get(&self, path: &str) -> Option<String> {
        let (status, token) = self.token("60");
        assert_eq!(status, 200, "{token}");
        let header = format!("X-aws-ec2-metadata-token: {token}\r\n");
        let (status, body) = self.request("GET", path, &header).unwrap();
        (status == 200).then_some(body)
    }
}
