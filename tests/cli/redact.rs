//! Makes what was printed the same in every run: ids, times and temporary paths get names.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

/// Replaces what differs from run to run; the same id gets the same name throughout.
#[derive(Debug, Default)]
pub(crate) struct Redactor {
    named: Vec<(String, String)>,
    /// Whole ids of checkpoints, in the order in which they were first seen.
    ids: Mutex<Vec<String>>,
    images: Mutex<BTreeMap<String, usize>>,
}

impl Redactor {
    /// Shows `text` as `name`.
    pub(crate) fn name(&mut self, text: &Path, name: &str) {
        self.named.push((text.display().to_string(), name.to_owned()));
        // The longest first: one may lie in another.
        self.named.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
    }

    /// Redacts a text; columns that the redaction would shift are set two blanks apart.
    pub(crate) fn redact(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (what, name) in &self.named {
            text = text.replace(what, name);
        }
        text.lines().map(|line| squeeze(&self.words(line)) + "\n").collect()
    }

    /// Replaces the words of a line that are ids, images or times.
    fn words(&self, line: &str) -> String {
        let is_word = |c: char| c.is_ascii_alphanumeric() || "-:.+".contains(c);
        let mut seen = String::new();
        let mut rest = line;
        while let Some(start) = rest.find(is_word) {
            seen.push_str(&rest[..start]);
            let word = &rest[start..];
            let end = word.find(|c| !is_word(c)).unwrap_or(word.len());
            seen.push_str(&self.word(&word[..end]));
            rest = &word[end..];
        }
        seen + rest
    }

    fn word(&self, word: &str) -> String {
        let end = word.trim_end_matches([':', '.', '-']);
        let tail = &word[end.len()..];
        let name = if is_time(end) {
            "TIME".into()
        } else if let Some((kind, id)) =
            end.split_once('-').filter(|(kind, id)| matches!(*kind, "s" | "v") && (is_hex(id, 32) || is_hex(id, 16)))
        {
            let mut images = self.images.lock().unwrap();
            let next = images.len() + 1;
            format!("{kind}-IMAGE{}", images.entry(id.to_owned()).or_insert(next))
        } else if is_uuid(end) {
            "UUID".into()
        } else {
            let digits = end.bytes().take_while(u8::is_ascii_hexdigit).count();
            let (id, more) = end.split_at(digits);
            match self.id(id) {
                // A branch that got its name from its checkpoint, or a step back from one.
                Some(number) if !more.starts_with(|c: char| c.is_ascii_alphanumeric()) => format!("ID{number}{more}"),
                _ => end.to_owned(),
            }
        };
        name + tail
    }

    /// The number of a checkpoint's id, whole or short.
    fn id(&self, text: &str) -> Option<usize> {
        if !is_hex(text, 32) && !is_hex(text, 12) {
            return None;
        }
        let mut ids = self.ids.lock().unwrap();
        let known = ids.iter().position(|id| id.starts_with(text) || text.starts_with(id.as_str()));
        Some(
            known.unwrap_or_else(|| {
                ids.push(text.to_owned());
                ids.len() - 1
            }) + 1,
        )
    }
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_uuid(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    parts.len() == 5 && parts.iter().zip([8, 4, 4, 4, 12]).all(|(part, length)| is_hex(part, length))
}

fn is_time(text: &str) -> bool {
    text.len() == "2026-01-01T00:00:00.000Z".len()
        && text.bytes().zip(b"2026-01-01T00:00:00.000Z").all(|(c, like)| match like {
            b'0'..=b'9' => c.is_ascii_digit(),
            _ => c == *like,
        })
}

/// Sets columns two blanks apart, and leaves the indentation.
fn squeeze(line: &str) -> String {
    let body = line.trim_start_matches(' ');
    let mut squeezed = line[..line.len() - body.len()].to_owned();
    let mut blanks = 0;
    for c in body.chars() {
        blanks = if c == ' ' { blanks + 1 } else { 0 };
        if blanks <= 2 {
            squeezed.push(c);
        }
    }
    squeezed
}

#[test]
fn the_same_id_gets_the_same_name() {
    let mut redactor = Redactor::default();
    redactor.name(Path::new("/tmp/x"), "$T");
    let (a, b) = ("0123456789ab".repeat(3)[..32].to_owned(), "f".repeat(32));
    let text = format!("{a} {b}\n0123456789ab-1    2026-01-01T10:20:30.123Z /tmp/x/s-{b}: {}\n", &b[..12]);
    assert_eq!(redactor.redact(&text), "ID1 ID2\nID1-1  TIME $T/s-IMAGE1: ID2\n");
    assert_eq!(redactor.redact("  deadbeef 0123456789abc facade\n"), "  deadbeef 0123456789abc facade\n");
}
