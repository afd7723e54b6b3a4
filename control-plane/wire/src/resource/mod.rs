//! The types of `turnpike-rules` to and from the wire.

/// Why bytes are not the resource they are said to be.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{type_name} `{name}`: {field}: {reason}")]
pub struct InvalidResource {
    /// `Service`, `Self`…
    pub type_name: &'static str,
    /// The resource's name.
    pub name: String,
    /// Where in the message: `ports[0].routes[2].hosts[0]`.
    pub field: String,
    pub reason: String,
}

/// A type that travels as a resource.
pub trait Resource: Sized {
    /// As in a subscription.
    const TYPE_URL: &'static str;

    /// Reads a resource of this name, and checks everything that its consumers rely on.
    fn decode(name: &str, bytes: &[u8]) -> Result<Self, InvalidResource>;

    fn encode(&self) -> Vec<u8>;
}
