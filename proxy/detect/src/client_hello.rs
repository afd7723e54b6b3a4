//! TLS ClientHello (RFC 8446 §4.1.2) from raw records.

/// The most bytes, record headers included, that a ClientHello may take.
///
/// A post-quantum hello is about 1.8 KB; nothing honest comes near this.
pub const MAX_CLIENT_HELLO: usize = 16 * 1024;

const HANDSHAKE: u8 = 0x16;
const CLIENT_HELLO: u8 = 1;
const RECORD_HEADER: usize = 5;
const MESSAGE_HEADER: usize = 4;
/// RFC 8446 §5.1: a plaintext record's fragment.
const MAX_FRAGMENT: usize = 1 << 14;

const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;

/// What a ClientHello says that a decision may rest on.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ClientHello {
    /// The server name in lower case without a trailing dot. Never an IP literal.
    pub sni: Option<String>,
    /// Protocol names in the client's order, GREASE values included.
    pub alpn: Vec<Vec<u8>>,
    /// An `encrypted_client_hello` extension is present: real or GREASE, which no observer can
    /// tell apart. With a real one, `sni` is the outer name.
    pub ech: bool,
    /// The client offers TLS 1.3.
    pub tls13: bool,
}

impl ClientHello {
    /// Whether one of the offered protocols begins with `prefix`.
    pub fn offers_prefix(&self, prefix: &[u8]) -> bool {
        self.alpn.iter().any(|name| name.starts_with(prefix))
    }
}

/// Why bytes that look like TLS are not a ClientHello to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    #[error("not a TLS handshake")]
    NotTls,
    #[error("the ClientHello breaks the TLS protocol; the client must send a well-formed one")]
    Malformed,
    #[error("the ClientHello is longer than 16 KiB")]
    TooLong,
    #[error("the ClientHello carries an extension twice, so that its server name is ambiguous")]
    DuplicateExtension,
    #[error("the server name in the ClientHello is an IP address; RFC 6066 allows host names only")]
    AddressAsName,
    #[error("the server name in the ClientHello is not a host name")]
    InvalidName,
}

/// The ClientHello that `bytes` begin with; `None` while it is incomplete.
///
/// It may be spread over any number of records; bytes after it are ignored.
pub fn client_hello(bytes: &[u8]) -> Result<Option<ClientHello>, Refusal> {
    let seen = &bytes[..bytes.len().min(MAX_CLIENT_HELLO)];
    match message(seen)? {
        Some(body) => parse(&body).map(Some),
        None if bytes.len() >= MAX_CLIENT_HELLO => Err(Refusal::TooLong),
        None => Ok(None),
    }
}

/// The handshake message's body, put together from its records.
fn message(mut bytes: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    let mut message = Vec::new();
    loop {
        if !plausible_record(bytes) {
            return Err(if message.is_empty() {
                Refusal::NotTls
            } else {
                Refusal::Malformed
            });
        }
        let Some((header, rest)) = bytes.split_first_chunk::<RECORD_HEADER>() else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if length == 0 || length > MAX_FRAGMENT {
            return Err(Refusal::Malformed);
        }
        let available = &rest[..rest.len().min(length)];
        message.extend_from_slice(available);
        if let Some(wanted) = wanted(&message)? {
            if message.len() >= wanted {
                message.truncate(wanted);
                message.drain(..MESSAGE_HEADER);
                return Ok(Some(message));
            }
            if wanted > MAX_CLIENT_HELLO {
                return Err(Refusal::TooLong);
            }
        }
        if available.len() < length {
            return Ok(None);
        }
        bytes = &rest[length..];
    }
}

/// As far as the header has arrived: type handshake, version 3.x (middleboxes keep it below 3.4).
fn plausible_record(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|kind| *kind == HANDSHAKE)
        && bytes.get(1).is_none_or(|major| *major == 3)
        && bytes.get(2).is_none_or(|minor| *minor <= 4)
}

/// The whole message's length with its header, once that is known.
fn wanted(message: &[u8]) -> Result<Option<usize>, Refusal> {
    if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
        return Err(Refusal::Malformed);
    }
    let Some([_, a, b, c]) = message.first_chunk::<MESSAGE_HEADER>() else {
        return Ok(None);
    };
    let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
    Ok(Some(MESSAGE_HEADER + length))
}

/// A cursor over length-prefixed fields; every read is checked.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Refusal> {
        let (head, rest) = self.0.split_at_checked(length).ok_or(Refusal::Malformed)?;
        self.0 = rest;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8, Refusal> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, Refusal> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn short(&mut self) -> Result<&'a [u8], Refusal> {
        let length = self.u8()?;
        self.take(length.into())
    }

    fn long(&mut self) -> Result<&'a [u8], Refusal> {
        let length = self.u16()?;
        self.take(length.into())
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn parse(body: &[u8]) -> Result<ClientHello, Refusal> {
    let mut reader = Reader(body);
    let legacy_version = reader.u16()?;
    if legacy_version >> 8 != 3 {
        return Err(Refusal::Malformed);
    }
    reader.take(32)?; // random
    reader.short()?; // legacy session id
    if reader.long()?.is_empty() {
        return Err(Refusal::Malformed); // no cipher suite
    }
    if reader.short()?.is_empty() {
        return Err(Refusal::Malformed); // no compression method
    }
    let mut hello = ClientHello::default();
    if reader.is_empty() {
        return Ok(hello); // TLS 1.2 and before may have no extensions
    }
    let mut extensions = Reader(reader.long()?);
    if !reader.is_empty() {
        return Err(Refusal::Malformed);
    }
    let mut seen = Vec::with_capacity(24);
    while !extensions.is_empty() {
        let kind = extensions.u16()?;
        let content = extensions.long()?;
        seen.push(kind);
        match kind {
            SERVER_NAME => hello.sni = Some(server_name(content)?),
            ALPN => hello.alpn = protocols(content)?,
            SUPPORTED_VERSIONS => hello.tls13 = offers_tls13(content)?,
            ENCRYPTED_CLIENT_HELLO => hello.ech = true,
            _ => {}
        }
    }
    seen.sort_unstable();
    if seen.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Refusal::DuplicateExtension);
    }
    Ok(hello)
}

/// RFC 6066 §3: a list that may hold one name of type host_name, and no other type exists.
fn server_name(content: &[u8]) -> Result<String, Refusal> {
    let mut outer = Reader(content);
    let mut list = Reader(outer.long()?);
    if !outer.is_empty() || list.u8()? != 0 {
        return Err(Refusal::Malformed);
    }
    let name = list.long()?;
    if !list.is_empty() {
        return Err(Refusal::DuplicateExtension);
    }
    host_name(name)
}

fn host_name(name: &[u8]) -> Result<String, Refusal> {
    let text = std::str::from_utf8(name).map_err(|_| Refusal::InvalidName)?;
    let text = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if is_address(&text) {
        return Err(Refusal::AddressAsName);
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if text.len() > 253 || !text.split('.').all(label) {
        return Err(Refusal::InvalidName);
    }
    Ok(text)
}

/// An IPv6 literal, or a last label that some resolver reads as a number: `10.1`, `0x7f000001`
/// (the URL standard's "ends in a number").
fn is_address(text: &str) -> bool {
    let last = text.rsplit('.').next().unwrap_or(text);
    let number =
        |digits: &str, radix| !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
    text.contains(':')
        || number(last, 10)
        || last
            .strip_prefix("0x")
            .is_some_and(|hex| hex.is_empty() || number(hex, 16))
}

fn protocols(content: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
    let mut outer = Reader(content);
    let mut list = Reader(outer.long()?);
    if !outer.is_empty() || list.is_empty() {
        return Err(Refusal::Malformed);
    }
    let mut protocols = Vec::new();
    while !list.is_empty() {
        let name = list.short()?;
        if name.is_empty() {
            return Err(Refusal::Malformed);
        }
        protocols.push(name.to_vec());
    }
    Ok(protocols)
}

fn offers_tls13(content: &[u8]) -> Result<bool, Refusal> {
    let mut outer = Reader(content);
    let mut list = Reader(outer.short()?);
    let mut found = false;
    while !list.is_empty() {
        found |= list.u16()? == 0x0304;
    }
    if outer.is_empty() {
        Ok(found)
    } else {
        Err(Refusal::Malformed)
    }
}

#[cfg(test)]
mod tests;
