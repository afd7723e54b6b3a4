//! Request paths in the one form that is authorised and forwarded.
//!
//! [`normalise`] brings every spelling that RFC 3986 calls equivalent into one, and refuses what
//! servers read in different ways, so that no server sees another path than the one that was
//! judged:
//!
//! | arrives as | becomes |
//! |---|---|
//! | `%41`, `%7e` (unreserved, encoded) | decoded: `A`, `~` |
//! | `%3a`, `%c3` (anything else encoded) | kept, with upper case digits |
//! | `{`, `"`, `é` (not allowed in a path) | encoded |
//! | `/a/./b`, `/a/x/../b` | `/a/b` |
//! | `/..`, `/a/..;x/b`, `/a//../b` | refused: servers disagree where it leads |
//! | `%2F`, `\`, `%5C` | refused: a separator for some servers only |
//! | control characters, encoded or not, spaces, `#`, `?` | refused |
//! | `%zz`, `%4`, overlong UTF-8 | refused |
//! | `//`, `;x` | kept: applications rely on both |
//!
//! What is kept may still be read in two ways (`/a;x/b` is `/a/b` to a servlet container, `//` is
//! `/` to nginx, `%3A` is `:` to most). Such a path has a second, [`lenient`] reading, and rules
//! are asked about both: what denies denies if either matches, what allows must match both.

use std::borrow::Cow;

/// Why a path is refused; the answer is 400.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidPath {
    #[error("a path starts with `/`")]
    NotAbsolute,
    #[error("a space, a control character, `#` or `?` may not stand in a path, encoded or not")]
    Character,
    #[error("`%` must be followed by two hexadecimal digits")]
    Encoding,
    #[error("a backslash or an encoded slash is a separator for some servers only")]
    Separator,
    #[error("overlong UTF-8 hides another character")]
    Overlong,
    #[error("the path leads above its root")]
    AboveRoot,
    #[error("`..` after an empty element, or with parameters, leads elsewhere on each server")]
    AmbiguousDots,
}

/// Brings a path (without its query) into normal form. Borrows where nothing changes.
///
/// An empty path is `/`; `*` (of `OPTIONS *`) is itself.
pub fn normalise(path: &str) -> Result<Cow<'_, str>, InvalidPath> {
    if path.is_empty() {
        return Ok(Cow::Borrowed("/"));
    }
    if path == "*" {
        return Ok(Cow::Borrowed(path));
    }
    if !path.starts_with('/') {
        return Err(InvalidPath::NotAbsolute);
    }
    let spelled = respell(path)?;
    if has_dots(&spelled) {
        Ok(Cow::Owned(resolve_dots(&spelled)?))
    } else {
        Ok(spelled)
    }
}

/// The second reading of a path in normal form: what a server takes it for that drops parameters,
/// merges slashes and decodes all. `None` where there is no other reading.
pub fn lenient(path: &str) -> Option<String> {
    if !path.contains([';', '%']) && !path.contains("//") {
        return None;
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut parameters = false;
    for &b in path.as_bytes() {
        match b {
            b'/' => {
                parameters = false;
                if bytes.last() != Some(&b'/') {
                    bytes.push(b);
                }
            }
            b';' => parameters = true,
            _ if parameters => {}
            b => bytes.push(b),
        }
    }
    let decoded = percent_encoding::percent_decode(&bytes).decode_utf8_lossy();
    (decoded != path).then(|| decoded.into_owned())
}

/// One spelling for each character, or a refusal. Copies from the first that changes.
fn respell(path: &str) -> Result<Cow<'_, str>, InvalidPath> {
    let bytes = path.as_bytes();
    let mut out: Option<String> = None;
    let mut at = 0;
    while at < bytes.len() {
        let (took, spelled) = match bytes[at] {
            b'%' => {
                let byte = decode(bytes, at).ok_or(InvalidPath::Encoding)?;
                (3, respell_encoded(byte, decode(bytes, at + 3))?)
            }
            b'\\' => return Err(InvalidPath::Separator),
            b'#' | b'?' | b' ' => return Err(InvalidPath::Character),
            b if b.is_ascii_control() => return Err(InvalidPath::Character),
            b if !is_path_character(b) => (1, Spelled::Encoded(b)),
            b => (1, Spelled::Plain(b)),
        };
        let unchanged = match spelled {
            Spelled::Plain(_) => took == 1,
            Spelled::Encoded(b) => took == 3 && bytes[at + 1..at + 3] == hex(b),
        };
        if !unchanged && out.is_none() {
            let mut copy = String::with_capacity(path.len() + 8);
            copy.push_str(&path[..at]);
            out = Some(copy);
        }
        if let Some(out) = &mut out {
            match spelled {
                Spelled::Plain(b) => out.push(b.into()),
                Spelled::Encoded(b) => out.extend(['%', hex(b)[0].into(), hex(b)[1].into()]),
            }
        }
        at += took;
    }
    Ok(out.map_or(Cow::Borrowed(path), Cow::Owned))
}

/// ASCII, in either case.
#[derive(Clone, Copy)]
enum Spelled {
    Plain(u8),
    Encoded(u8),
}

/// `next` is the byte encoded right after, which shows overlong UTF-8.
fn respell_encoded(byte: u8, next: Option<u8>) -> Result<Spelled, InvalidPath> {
    match (byte, next) {
        (b'/' | b'\\', _) => Err(InvalidPath::Separator),
        (0xc0 | 0xc1, _) | (0xe0, Some(0x80..=0x9f)) | (0xf0, Some(0x80..=0x8f)) => {
            Err(InvalidPath::Overlong)
        }
        (b, _) if b.is_ascii_control() => Err(InvalidPath::Character),
        (b, _) if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => Ok(Spelled::Plain(b)),
        (b, _) => Ok(Spelled::Encoded(b)),
    }
}

fn decode(bytes: &[u8], at: usize) -> Option<u8> {
    let [b'%', high, low] = bytes.get(at..at + 3)? else {
        return None;
    };
    let digit = |b: &u8| (*b as char).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

fn hex(byte: u8) -> [u8; 2] {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    [
        DIGITS[usize::from(byte >> 4)],
        DIGITS[usize::from(byte & 15)],
    ]
}

/// RFC 3986 `pchar` without `%`, and `/`.
fn is_path_character(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(&b)
}

/// Whether any element is `.` or `..`, with or without parameters.
fn has_dots(path: &str) -> bool {
    path.contains("/.") && path.split('/').any(|element| dots(element).is_some())
}

enum Dots {
    Here,
    Up,
    WithParameters,
}

fn dots(element: &str) -> Option<Dots> {
    match element {
        "." => Some(Dots::Here),
        ".." => Some(Dots::Up),
        _ => {
            let name = element
                .split_once(';')
                .or_else(|| element.split_once("%3B"))?
                .0;
            (name == "." || name == "..").then_some(Dots::WithParameters)
        }
    }
}

fn resolve_dots(path: &str) -> Result<String, InvalidPath> {
    let mut elements: Vec<&str> = Vec::new();
    let mut open = false;
    for element in path.split('/').skip(1) {
        open = true;
        match dots(element) {
            None => {
                elements.push(element);
                open = false;
            }
            Some(Dots::Here) => {}
            Some(Dots::WithParameters) => return Err(InvalidPath::AmbiguousDots),
            Some(Dots::Up) => match elements.pop() {
                None => return Err(InvalidPath::AboveRoot),
                Some("") => return Err(InvalidPath::AmbiguousDots),
                Some(_) => {}
            },
        }
    }
    // A path that ends in dots names the folder itself: `/a/.` is `/a/`.
    if open {
        elements.push("");
    }
    let mut out = String::with_capacity(path.len());
    for element in elements {
        out.push('/');
        out.push_str(element);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equivalent_spellings_become_one() {
        for (path, normal) in [
            ("", "/"),
            ("/", "/"),
            ("*", "*"),
            ("/a/b", "/a/b"),
            ("/%61%2D%2e%5F%7e", "/a-._~"),
            ("/a%3ab", "/a%3Ab"),
            ("/a:b", "/a:b"),
            ("/%c3%A9", "/%C3%A9"),
            ("/é", "/%C3%A9"),
            ("/a{b}|", "/a%7Bb%7D%7C"),
            ("/a/./b", "/a/b"),
            ("/a/x/../b", "/a/b"),
            ("/a/%2e%2E/b", "/b"),
            ("/a/.", "/a/"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/.", "/"),
            ("/a//b", "/a//b"),
            ("//a", "//a"),
            ("/a//./b", "/a//b"),
            ("/a;x=1/b", "/a;x=1/b"),
            ("/...", "/..."),
            ("/.well-known/x", "/.well-known/x"),
            ("/%2541", "/%2541"),
            ("/a%20b", "/a%20b"),
        ] {
            assert_eq!(normalise(path).as_deref(), Ok(normal), "{path}");
        }
    }

    #[test]
    fn the_common_case_borrows() {
        for path in ["/", "/v1/things/42", "/a%20b", "/.well-known/x", "/a//b;c"] {
            assert!(matches!(normalise(path), Ok(Cow::Borrowed(_))), "{path}");
        }
    }

    #[test]
    fn ambiguous_paths_are_refused() {
        for (path, why) in [
            ("a", InvalidPath::NotAbsolute),
            ("/a\\b", InvalidPath::Separator),
            ("/a%5cb", InvalidPath::Separator),
            ("/a%2fb", InvalidPath::Separator),
            ("/a%2Fb", InvalidPath::Separator),
            ("/a%zz", InvalidPath::Encoding),
            ("/a%4", InvalidPath::Encoding),
            ("/a%", InvalidPath::Encoding),
            ("/a%+1", InvalidPath::Encoding),
            ("/a%é", InvalidPath::Encoding),
            ("/a%00", InvalidPath::Character),
            ("/a%0d%0ab", InvalidPath::Character),
            ("/a\nb", InvalidPath::Character),
            ("/a b", InvalidPath::Character),
            ("/a#b", InvalidPath::Character),
            ("/a?b", InvalidPath::Character),
            ("/a\u{7f}", InvalidPath::Character),
            ("/%c0%ae%c0%ae/x", InvalidPath::Overlong),
            ("/%e0%80%af", InvalidPath::Overlong),
            ("/%f0%80%80%af", InvalidPath::Overlong),
            ("/..", InvalidPath::AboveRoot),
            ("/../a", InvalidPath::AboveRoot),
            ("/a/../../b", InvalidPath::AboveRoot),
            ("/a//../b", InvalidPath::AmbiguousDots),
            ("/a/..;x/b", InvalidPath::AmbiguousDots),
            ("/a/%2e.;/b", InvalidPath::AmbiguousDots),
            ("/a/.;/b", InvalidPath::AmbiguousDots),
            ("/a/..%3b/b", InvalidPath::AmbiguousDots),
        ] {
            assert_eq!(normalise(path), Err(why), "{path:?}");
        }
    }

    #[test]
    fn the_lenient_reading_drops_what_servers_may_drop() {
        for (path, other) in [
            ("/a/b", None),
            ("/a;x/b", Some("/a/b")),
            ("/a;x/b;y", Some("/a/b")),
            ("/a//b", Some("/a/b")),
            ("/a/;x/b", Some("/a/b")),
            ("/a%3Ab", Some("/a:b")),
            ("/a%3Bx/b", Some("/a;x/b")),
            ("//", Some("/")),
        ] {
            assert_eq!(lenient(path).as_deref(), other, "{path}");
        }
    }

    proptest! {
        #[test]
        fn normal_is_normal(path in "/([a-z./;%:{]|%[0-9a-fA-F]{2}|/\\.\\.?/|é){0,24}") {
            if let Ok(once) = normalise(&path) {
                let twice = normalise(&once);
                prop_assert_eq!(twice.as_deref(), Ok(&*once));
                prop_assert!(matches!(twice, Ok(Cow::Borrowed(_))));
                prop_assert!(once.starts_with('/') && once.is_ascii());
                prop_assert!(once.split('/').all(|e| e != "." && e != ".."));
            }
        }

        #[test]
        fn no_text_panics(path in any::<String>()) {
            if let Ok(normal) = normalise(&path) {
                let _ = lenient(&normal);
            }
        }

        /// The standard decoder sees the same bytes before and after, where no dots are resolved.
        #[test]
        fn respelling_keeps_the_meaning(path in "/([a-zé:;{]|%[0-9a-fA-F]{2}){0,24}") {
            if let Ok(normal) = normalise(&path) && !has_dots(&respell(&path).unwrap()) {
                let decode = |text: &str| {
                    percent_encoding::percent_decode_str(text).collect::<Vec<_>>()
                };
                prop_assert_eq!(decode(&path), decode(&normal));
            }
        }
    }
}
