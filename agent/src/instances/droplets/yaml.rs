//! The text values of a small YAML mapping, as Ruby's and Go's stagers write it.
//!
//! Ruby folds long plain texts over several lines, quotes some, and writes texts with line ends as block
//! scalars; later stagers write JSON into the same file. That is all that is read here: anchors, tags and
//! nested values are refused where they are asked for and skipped where they are not, because a wrong
//! start command is worse than none.

use serde_json::Value;

/// Why a value cannot be read.
pub(super) type Unreadable = &'static str;

/// The text that top-level `key` has in `document`; `None` if the key is absent, null or empty.
///
/// # Errors
/// If the key is there with a value that is no text, or one written in a way that is not understood.
pub(crate) fn text(document: &str, key: &str) -> Result<Option<String>, Unreadable> {
    let document = document.strip_prefix('\u{feff}').unwrap_or(document);
    if document.trim_start().starts_with('{') {
        return json(document, key);
    }
    let mut lines = document.lines().enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        if let Some(after) = line.strip_prefix("---") {
            let inline = after.trim();
            if inline.starts_with('{') {
                return json(inline, key);
            }
            if number > 0 && !inline.is_empty() {
                return Err("it is more than one mapping");
            }
            continue;
        }
        if line.starts_with("...") {
            break;
        }
        let Some(rest) = value_of(line, key) else {
            continue;
        };
        let mut block = Vec::new();
        while let Some((_, more)) = lines.next_if(|(_, line)| belongs_to_value(line)) {
            block.push(more);
        }
        let found = value(rest, &block)?;
        return Ok(found.filter(|text| !text.trim().is_empty()));
    }
    Ok(None)
}

fn json(document: &str, key: &str) -> Result<Option<String>, Unreadable> {
    let document: Value = serde_json::from_str(document).map_err(|_| "it is no valid JSON")?;
    match document.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.trim().is_empty())),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            Err("the value is no text")
        }
    }
}

/// What stands behind `key:` if `line` is that.
fn value_of<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let rest = line
        .strip_prefix(key)
        .or_else(|| line.strip_prefix('"')?.strip_prefix(key)?.strip_prefix('"'))
        .or_else(|| {
            line.strip_prefix('\'')?
                .strip_prefix(key)?
                .strip_prefix('\'')
        })?;
    let rest = rest.trim_start_matches([' ', '\t']).strip_prefix(':')?;
    (rest.is_empty() || rest.starts_with([' ', '\t'])).then(|| rest.trim_start())
}

fn belongs_to_value(line: &str) -> bool {
    line.trim().is_empty() || line.starts_with([' ', '\t'])
}

/// The value whose first line is `rest` and whose further lines are `block`.
fn value(rest: &str, block: &[&str]) -> Result<Option<String>, Unreadable> {
    let rest = untagged(rest)?;
    match rest.chars().next() {
        None | Some('#') => match block.split_first() {
            Some((first, others)) if first.trim().is_empty() => value("", others),
            Some((first, others)) => {
                let first = first.trim();
                if first.starts_with("- ") || first.starts_with("? ") || first == "-" {
                    return Err("the value is no text");
                }
                value(first, others)
            }
            None => Ok(None),
        },
        Some('|' | '>') => block_scalar(rest, block).map(Some),
        Some(quote @ ('"' | '\'')) => quoted(quote, rest, block).map(Some),
        Some('&' | '*' | '[' | '{' | '%' | '@' | '`' | '!') => Err("the value is no plain text"),
        Some(_) => plain(rest, block),
    }
}

/// Without the tag for texts, which old versions of Ruby wrote: `! 'echo: 1'`.
fn untagged(rest: &str) -> Result<&str, Unreadable> {
    if !rest.starts_with('!') {
        return Ok(rest);
    }
    let (tag, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    if matches!(tag, "!" | "!!str" | "!str") {
        Ok(rest.trim_start())
    } else {
        Err("the value has a tag that is not understood")
    }
}

fn plain(rest: &str, block: &[&str]) -> Result<Option<String>, Unreadable> {
    let mut text = String::new();
    let mut breaks = 0;
    for line in std::iter::once(&rest).chain(block) {
        let line = uncommented(line.trim());
        if line.contains(": ") || line.ends_with(':') {
            return Err("the value is a mapping, or a text that needs quotes");
        }
        if line.is_empty() {
            breaks += 1;
            continue;
        }
        if !text.is_empty() {
            fold(&mut text, breaks);
        }
        breaks = 0;
        text.push_str(line);
    }
    let null = matches!(text.as_str(), "~" | "null" | "Null" | "NULL");
    Ok(Some(text).filter(|_| !null))
}

fn uncommented(line: &str) -> &str {
    if line.starts_with('#') {
        return "";
    }
    line.split_once(" #")
        .map_or(line, |(text, _)| text)
        .trim_end()
}

/// A line end inside a folded text: a space, or one line end for each empty line.
fn fold(text: &mut String, empty_lines: usize) {
    if empty_lines == 0 {
        text.push(' ');
    }
    text.extend(std::iter::repeat_n('\n', empty_lines));
}

/// `|` or `>`, with `-`, `+` and the indentation behind it.
fn block_scalar(header: &str, block: &[&str]) -> Result<String, Unreadable> {
    let mut indent = None;
    let (mut strip, mut keep) = (false, false);
    for c in uncommented(header).chars().skip(1) {
        match c {
            '-' => strip = true,
            '+' => keep = true,
            '1'..='9' => indent = c.to_digit(10),
            _ => return Err("the header of the block is not understood"),
        }
    }
    let of_first = || {
        block
            .iter()
            .find(|line| !line.trim().is_empty())
            .map(|line| width(line))
    };
    let indent = indent
        .and_then(|digit| usize::try_from(digit).ok())
        .or_else(of_first)
        .unwrap_or(0);
    let lines: Vec<&str> = block
        .iter()
        .map(|line| line.get(indent.min(width(line))..).unwrap_or_default())
        .collect();
    let last = lines
        .iter()
        .rposition(|line| !line.is_empty())
        .map_or(0, |at| at + 1);
    let (lines, trailing) = lines.split_at_checked(last).unwrap_or_default();
    let mut text = if header.starts_with('|') {
        lines.join("\n")
    } else {
        folded_block(lines)?
    };
    if keep {
        text.extend(std::iter::repeat_n('\n', trailing.len() + 1));
    } else if !strip && !text.is_empty() {
        text.push('\n');
    }
    Ok(text)
}

fn folded_block(lines: &[&str]) -> Result<String, Unreadable> {
    let mut text = String::new();
    let mut breaks = 0;
    for line in lines {
        if line.starts_with([' ', '\t']) {
            return Err("the folded block has lines of different indentation");
        }
        if line.is_empty() {
            breaks += 1;
            continue;
        }
        if !text.is_empty() {
            fold(&mut text, breaks);
        }
        breaks = 0;
        text.push_str(line);
    }
    Ok(text)
}

fn width(line: &str) -> usize {
    line.len() - line.trim_start_matches(' ').len()
}

/// A quoted text, perhaps folded over lines.
fn quoted(quote: char, rest: &str, block: &[&str]) -> Result<String, Unreadable> {
    let whole = std::iter::once(&rest)
        .chain(block)
        .copied()
        .collect::<Vec<_>>()
        .join("\n");
    let mut chars = whole.chars().skip(1).peekable();
    let mut text = String::new();
    // What was escaped is never trimmed at a line end.
    let mut solid = 0;
    while let Some(c) = chars.next() {
        match c {
            '\'' if quote == '\'' && chars.next_if_eq(&'\'').is_some() => text.push('\''),
            c if c == quote => return closed(chars.collect(), text),
            '\\' if quote == '"' => {
                escape(&mut chars, &mut text)?;
                solid = text.len();
            }
            '\n' => {
                let kept = text.trim_end_matches([' ', '\t']).len().max(solid);
                text.truncate(kept);
                let mut empty_lines = 0;
                while let Some(space) = chars.next_if(|c| matches!(c, ' ' | '\t' | '\n')) {
                    empty_lines += usize::from(space == '\n');
                }
                fold(&mut text, empty_lines);
                solid = text.len();
            }
            c => text.push(c),
        }
    }
    Err("its quotes are not closed")
}

fn closed(rest: String, text: String) -> Result<String, Unreadable> {
    let rest = rest.trim();
    if rest.is_empty() || rest.starts_with('#') {
        Ok(text)
    } else {
        Err("something stands behind the closing quote")
    }
}

fn escape(
    chars: &mut std::iter::Peekable<impl Iterator<Item = char>>,
    text: &mut String,
) -> Result<(), Unreadable> {
    let digits = match chars.next() {
        Some('\n') => {
            while chars.next_if(|c| matches!(c, ' ' | '\t')).is_some() {}
            return Ok(());
        }
        Some('x') => 2,
        Some('u') => 4,
        Some('U') => 8,
        Some(letter) => {
            text.push(match letter {
                '0' => '\0',
                'a' => '\u{7}',
                'b' => '\u{8}',
                't' | '\t' => '\t',
                'n' => '\n',
                'v' => '\u{b}',
                'f' => '\u{c}',
                'r' => '\r',
                'e' => '\u{1b}',
                'N' => '\u{85}',
                '_' => '\u{a0}',
                'L' => '\u{2028}',
                'P' => '\u{2029}',
                ' ' | '"' | '/' | '\\' => letter,
                _ => return Err("it has an escape that is not understood"),
            });
            return Ok(());
        }
        None => return Err("its quotes are not closed"),
    };
    let mut code = 0u32;
    for _ in 0..digits {
        let digit = chars
            .next()
            .and_then(|c| c.to_digit(16))
            .ok_or("it has a broken escape")?;
        code = code << 4 | digit;
    }
    text.push(char::from_u32(code).ok_or("it has a broken escape")?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn is(document: &str, wanted: &str) {
        assert_eq!(
            text(document, "start_command"),
            Ok(Some(wanted.to_owned())),
            "{document}"
        );
    }

    #[test]
    fn plain_and_quoted_values() {
        is(
            "---\nbuildpack_path: /x\nstart_command: rackup -p $PORT\n",
            "rackup -p $PORT",
        );
        is("start_command: a   # a comment\n", "a");
        is("start_command: a#b http://x:80/\n", "a#b http://x:80/");
        is("start_command: 'it''s: \"1\"' \n", "it's: \"1\"");
        is(
            "start_command: \"a\\tb\\u00e9\\\"\\\\ \\x41\"\n",
            "a\tbé\"\\ A",
        );
        is("start_command: ! 'a: b'\n", "a: b");
        is("\"start_command\": x\r\n'other': y\r\n", "x");
        is("\u{feff}start_command: true", "true");
    }

    #[test]
    fn values_over_several_lines() {
        is(
            "start_command: JAVA=1 java\n  -Xmx1g -jar\n  app.jar\nnext: 1\n",
            "JAVA=1 java -Xmx1g -jar app.jar",
        );
        is("start_command: 'a\n  b\n\n  c'\n", "a b\nc");
        is("start_command: \"a \\\n  \\ b\n  c\"\n", "a  b c");
        is(
            "start_command: |-\n  a\n    b\n\n  c\nx: 1\n",
            "a\n  b\n\nc",
        );
        is("start_command: |\n  a\n\n", "a\n");
        is("start_command: |+\n  a\n\n", "a\n\n");
        is("start_command: >-\n  a\n  b\n\n  c\n", "a b\nc");
        is("start_command: |2-\n   a\n", " a");
        is("start_command:\n  a\n  b\n", "a b");
    }

    #[test]
    fn json_values() {
        is(
            r#"{"detected_buildpack":"","start_command":"node \"x\""}"#,
            "node \"x\"",
        );
        is("--- {\"start_command\": \"x\"}\n", "x");
        assert_eq!(text(r#"{"start_command":null}"#, "start_command"), Ok(None));
        assert!(text(r#"{"start_command":["a"]}"#, "start_command").is_err());
        assert!(text("{start_command: x}", "start_command").is_err());
    }

    #[test]
    fn absent_null_and_empty_are_none() {
        for document in [
            "",
            "---\n",
            "--- {}\n",
            "other: 1\n",
            "start_command:\n",
            "start_command: # nothing\nother: 1\n",
            "start_command: ~\n",
            "start_command: null\n",
            "start_command: ''\n",
            "start_command_x: 1\n",
            "start_command:x\n",
            "map:\n  start_command: nested\n",
            "text: |\n  x\n  start_command: in a block\n",
            "...\nstart_command: x\n",
        ] {
            assert_eq!(text(document, "start_command"), Ok(None), "{document}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for document in [
            "start_command: [a, b]\n",
            "start_command: {a: b}\n",
            "start_command: *alias\n",
            "start_command: &anchor a\n",
            "start_command: !binary |\n  YQ==\n",
            "start_command: !ruby/object:X {}\n",
            "start_command:\n- a\n".replace("\n-", "\n  -").as_str(),
            "start_command:\n  web: a\n",
            "start_command: a: b\n",
            "start_command: 'a\n",
            "start_command: 'a' b\n",
            "start_command: \"\\q\"\n",
            "start_command: \"\\ud800\"\n",
            "start_command: \"\\U99999999\"\n",
            "start_command: |x\n  a\n",
            "start_command: >\n  a\n    b\n",
        ] {
            assert!(text(document, "start_command").is_err(), "{document}");
        }
    }
}
