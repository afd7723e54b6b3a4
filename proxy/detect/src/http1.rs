//! HTTP/1: is this a request line, and is the framing of a request stream beyond doubt?

/// The longest method that is looked for.
pub const MAX_METHOD: usize = 32;
/// A request line is known by its end; one that has none within this is left to the HTTP parser,
/// whose limits answer it.
pub const MAX_REQUEST_LINE: usize = 8 * 1024;

/// Whether bytes begin with an HTTP/1 request line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestLine {
    NeedMore,
    Yes,
    No,
}

/// `METHOD SP target SP HTTP/1.x LF`, after at most two empty lines (RFC 9112 §2.2).
pub fn request_line(bytes: &[u8]) -> RequestLine {
    let mut rest = bytes;
    for _ in 0..2 {
        rest = rest.strip_prefix(b"\r\n").unwrap_or(rest);
    }
    if rest.is_empty() || (rest == b"\r" && bytes.len() <= 3) {
        return RequestLine::NeedMore;
    }
    let method = rest.iter().take_while(|byte| is_token(**byte)).count();
    match rest.get(method) {
        _ if method > MAX_METHOD => return RequestLine::No,
        None => return RequestLine::NeedMore,
        Some(b' ') if method > 0 => {}
        Some(_) => return RequestLine::No,
    }
    match rest
        .iter()
        .take(MAX_REQUEST_LINE)
        .position(|byte| *byte == b'\n')
    {
        Some(end) if names_http1(&rest[..end]) => RequestLine::Yes,
        Some(_) => RequestLine::No,
        // Counted over all bytes, so that the bound of detection holds whatever comes first.
        None if bytes.len() < MAX_REQUEST_LINE => RequestLine::NeedMore,
        None => RequestLine::Yes,
    }
}

fn names_http1(line: &[u8]) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    [&b" HTTP/1.1"[..], b" HTTP/1.0"]
        .iter()
        .any(|version| line.ends_with(version))
}

/// Whether a list of a header (RFC 9110 §5.6.1) names `token`, in whatever case.
pub fn lists(value: &[u8], token: &[u8]) -> bool {
    let mut members = value.split(|byte| *byte == b',');
    members.any(|member| member.trim_ascii().eq_ignore_ascii_case(token))
}

/// Whether a proxy may leave HTTP for what an `Upgrade` header offers: anything but HTTP/2 over
/// cleartext, whose requests it would lose sight of.
pub fn may_leave_for(protocols: &[u8]) -> bool {
    !protocols.trim_ascii().is_empty() && !lists(protocols, b"h2c")
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Why a request stream is refused: two parsers could read it in two ways, or it is no HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Violation {
    #[error("a line of the request head ends without CR")]
    BareLineFeed,
    #[error("a header is folded over several lines")]
    FoldedHeader,
    #[error("both Content-Length and Transfer-Encoding are present")]
    TwoFramings,
    #[error("Content-Length is present twice or is no number")]
    ContentLength,
    #[error("Transfer-Encoding is not exactly `chunked`")]
    TransferEncoding,
    #[error("Transfer-Encoding in an HTTP/1.0 request")]
    OldTransferEncoding,
    #[error("a chunk's size line is malformed")]
    ChunkSize,
    #[error("a line of the request head or of a chunk is longer than 64 KiB")]
    TooLong,
    #[error("white space between a header's name and its colon")]
    SpaceBeforeColon,
}

/// The longest line of a head.
const MAX_LINE: usize = 64 * 1024;
/// The longest line that delimits chunks, extensions included.
const MAX_CHUNK_LINE: usize = 256;
/// What of a line is kept to be looked at: the names and values that decide framing are short.
const KEPT: usize = 64;

/// Follows requests on one connection: heads line by line, bodies by their length.
///
/// Feed it every byte the client sends, in order and in any pieces, before the HTTP parser sees
/// them. It allocates nothing.
#[derive(Clone, Debug)]
pub struct Scanner {
    state: State,
    head: Head,
    line: Line,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a request line; empty lines are skipped.
    Start,
    Headers,
    Body(u64),
    ChunkSize,
    Chunk(u64),
    /// The CR LF behind a chunk.
    ChunkEnd,
    Trailers,
    /// The request asked to leave HTTP: what follows is followed only if it did not.
    Paused,
}

#[derive(Clone, Copy, Debug, Default)]
struct Head {
    length: Option<u64>,
    chunked: bool,
    http10: bool,
    connect: bool,
    /// The `Upgrade` headers so far, and whether a proxy may grant what they offer.
    offers: Option<bool>,
    /// `Connection` names `upgrade`, without which `Upgrade` is for nobody (RFC 9110 §7.8).
    nominated: bool,
}

/// The line being read: its first bytes, its length, and its last byte.
#[derive(Clone, Debug)]
struct Line {
    start: [u8; KEPT],
    length: usize,
    last: u8,
    /// The last ten bytes of a request line, to tell ` HTTP/1.0` however long it is.
    tail: [u8; 10],
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            state: State::Start,
            head: Head::default(),
            line: Line::new(),
        }
    }
}

impl Scanner {
    /// Takes the next bytes. On a violation: where in `bytes` the offending line ends.
    ///
    /// After an error the connection must be closed; nothing more is to be read from it.
    pub fn scan(&mut self, bytes: &[u8]) -> Result<(), (usize, Violation)> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            at += match self.state {
                State::Paused => rest.len(),
                State::Body(left) => self.skip(left, rest, State::Body, State::Start),
                State::Chunk(left) => self.skip(left, rest, State::Chunk, State::ChunkEnd),
                _ => self
                    .take_line(rest)
                    .map_err(|(offset, why)| (at + offset, why))?,
            };
        }
        Ok(())
    }

    /// Whether the client is in the middle of a request head.
    pub fn in_head(&self) -> bool {
        match self.state {
            State::Headers => true,
            State::Start => self.line.length > 0,
            _ => false,
        }
    }

    /// Whether a request's body is still to come.
    pub fn in_body(&self) -> bool {
        !matches!(self.state, State::Start | State::Headers | State::Paused)
    }

    fn skip(&mut self, left: u64, rest: &[u8], more: fn(u64) -> State, done: State) -> usize {
        let here = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
        let left = left - here as u64;
        self.state = if left == 0 { done } else { more(left) };
        here
    }

    fn take_line(&mut self, rest: &[u8]) -> Result<usize, (usize, Violation)> {
        let end = rest.iter().position(|byte| *byte == b'\n');
        let text = &rest[..end.unwrap_or(rest.len())];
        self.line.push(text, self.state == State::Start);
        let limit = match self.state {
            State::ChunkSize | State::ChunkEnd => MAX_CHUNK_LINE,
            _ => MAX_LINE,
        };
        if self.line.length > limit {
            return Err((text.len().saturating_sub(1), Violation::TooLong));
        }
        let Some(end) = end else {
            return Ok(rest.len());
        };
        if self.line.length == 0 || self.line.last != b'\r' {
            return Err((end, Violation::BareLineFeed));
        }
        let line = std::mem::replace(&mut self.line, Line::new());
        self.end_line(&line).map_err(|why| (end, why))?;
        Ok(end + 1)
    }

    fn end_line(&mut self, line: &Line) -> Result<(), Violation> {
        let text = line.kept();
        let empty = line.length == 1;
        self.state = match self.state {
            State::Start if empty => State::Start,
            State::Start => {
                let http10 = line.ends_with(b" HTTP/1.0\r");
                let connect = text.starts_with(b"CONNECT ");
                self.head = Head {
                    http10,
                    connect,
                    ..Head::default()
                };
                State::Headers
            }
            State::Headers if empty => self.end_head()?,
            State::Headers => {
                self.head.header(text, line.length)?;
                State::Headers
            }
            State::ChunkSize => match chunk_size(text, line.length)? {
                0 => State::Trailers,
                size => State::Chunk(size),
            },
            State::ChunkEnd if empty => State::ChunkSize,
            State::ChunkEnd => return Err(Violation::ChunkSize),
            State::Trailers if empty => State::Start,
            State::Trailers if matches!(text.first(), Some(b' ' | b'\t')) => {
                return Err(Violation::FoldedHeader);
            }
            other => other,
        };
        Ok(())
    }

    fn end_head(&self) -> Result<State, Violation> {
        let Head {
            length,
            chunked,
            http10,
            ..
        } = self.head;
        match (chunked, length) {
            (true, Some(_)) => Err(Violation::TwoFramings),
            (true, None) if http10 => Err(Violation::OldTransferEncoding),
            _ if self.head.leaves_http() => Ok(State::Paused),
            (true, None) => Ok(State::ChunkSize),
            (false, None | Some(0)) => Ok(State::Start),
            (false, Some(length)) => Ok(State::Body(length)),
        }
    }
}

impl Head {
    fn header(&mut self, line: &[u8], length: usize) -> Result<(), Violation> {
        if matches!(line.first(), Some(b' ' | b'\t')) {
            return Err(Violation::FoldedHeader);
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return Ok(()); // a long name, or no header at all: the parser's matter
        };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if matches!(name.last(), Some(b' ' | b'\t')) {
            return Err(Violation::SpaceBeforeColon);
        }
        // All of the line must have been kept for its value to count.
        let value = (length <= KEPT).then(|| value.trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let digits = value.filter(|v| !v.is_empty() && v.iter().all(u8::is_ascii_digit));
            let parsed = digits.and_then(|d| std::str::from_utf8(d).ok()?.parse().ok());
            if self.length.is_some() || parsed.is_none() {
                return Err(Violation::ContentLength);
            }
            self.length = parsed;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let chunked = value.is_some_and(|v| v.eq_ignore_ascii_case(b"chunked"));
            if self.chunked || !chunked {
                return Err(Violation::TransferEncoding);
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            let first = self.offers.is_none();
            self.offers = Some(first && value.is_some_and(may_leave_for));
        } else if name.eq_ignore_ascii_case(b"connection") {
            self.nominated |= value.is_some_and(|names| lists(names, b"upgrade"));
        }
        Ok(())
    }

    /// Only where whoever acts on the request must say so too: what stays HTTP stays followed.
    /// `Upgrade` and `Connection` in lines too long to be kept ask for nothing.
    fn leaves_http(&self) -> bool {
        self.connect || !self.http10 && self.nominated && self.offers == Some(true)
    }
}

/// `1*HEXDIG [ ";" extension ] CR`.
fn chunk_size(text: &[u8], length: usize) -> Result<u64, Violation> {
    let line = if length <= KEPT {
        text.strip_suffix(b"\r").unwrap_or(text)
    } else {
        text
    };
    let digits = line
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    let followed_well = matches!(line.get(digits), None | Some(b';' | b' ' | b'\t'));
    let size = std::str::from_utf8(&line[..digits]).ok();
    let size = size.filter(|text| text.len() <= 15 && followed_well);
    size.and_then(|text| u64::from_str_radix(text, 16).ok())
        .ok_or(Violation::ChunkSize)
}

impl Line {
    fn new() -> Self {
        Self {
            start: [0; KEPT],
            length: 0,
            last: 0,
            tail: [0; 10],
        }
    }

    fn push(&mut self, text: &[u8], request_line: bool) {
        if self.length < KEPT {
            let room = &mut self.start[self.length..];
            let here = room.len().min(text.len());
            room[..here].copy_from_slice(&text[..here]);
        }
        if request_line {
            self.keep_tail(text);
        }
        self.length += text.len();
        self.last = text.last().copied().unwrap_or(self.last);
    }

    fn keep_tail(&mut self, text: &[u8]) {
        for byte in &text[text.len().saturating_sub(self.tail.len())..] {
            self.tail.rotate_left(1);
            self.tail[9] = *byte;
        }
    }

    fn kept(&self) -> &[u8] {
        &self.start[..self.length.min(KEPT)]
    }

    fn ends_with(&self, end: &[u8; 10]) -> bool {
        &self.tail == end
    }
}

#[cfg(test)]
mod tests;
