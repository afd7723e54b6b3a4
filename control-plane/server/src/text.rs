//! Texts of others in our log.

/// With control characters written out, so that nobody can make up lines of the log.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_stays_one_line() {
        assert_eq!(
            one_line("it's `a`\n2026 INFO issued\u{1b}[0m"),
            "it's `a`\\n2026 INFO issued\\u{1b}[0m"
        );
    }
}
