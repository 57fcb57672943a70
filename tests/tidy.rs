//! The repository's own rules, as tests.
//!
//! Each rule is a function from sources to complaints. Two tests belong to each: the repository gives no complaint,
//! and a source that breaks the rule gives one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A text file of the repository.
#[derive(Debug, Clone)]
struct Source {
    /// Its path below the top, with `/`.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is part of what is shipped, and not of a test.
    fn is_product(&self) -> bool {
        self.is_rust() && (self.path.starts_with("src/") || self.backend().is_some())
    }

    /// The directory below `backends` whose source this is.
    fn backend(&self) -> Option<&str> {
        let (name, rest) = self.path.strip_prefix("backends/")?.split_once('/')?;
        rest.starts_with("src/").then_some(name)
    }

    fn complain(&self, line: usize, what: &str) -> String {
        format!("{}:{}: {what}", self.path, line + 1)
    }

    /// The lines of code, numbered from 0, without comments and without what stands in string literals.
    fn code(&self) -> Vec<(usize, String)> {
        let mut lines = Vec::new();
        let mut state = State::Code;
        for (number, line) in self.text.lines().enumerate() {
            let mut code = String::new();
            let mut rest = line;
            while !rest.is_empty() {
                let (used, next) = state.step(rest, &mut code);
                rest = &rest[used..];
                state = next;
            }
            lines.push((number, code));
        }
        lines
    }
}

/// Where a scan of Rust source stands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Code,
    BlockComment,
    Text,
    /// A raw string, which ends by a quotation mark and so many `#`.
    RawText(usize),
}

impl State {
    /// Consumes some bytes of `rest`, which is not empty, and appends them to `code` if they are code.
    fn step(self, rest: &str, code: &mut String) -> (usize, Self) {
        let width = rest.chars().next().map_or(1, char::len_utf8);
        match self {
            Self::Code if rest.starts_with("//") => (rest.len(), self),
            Self::Code if rest.starts_with("/*") => (2, Self::BlockComment),
            Self::Code if rest.starts_with("'\"'") => (3, self),
            Self::Code if rest.starts_with("'\\") => {
                (rest[2..].find('\'').map_or(rest.len(), |end| (end + 3).min(rest.len())), self)
            }
            Self::Code if rest.starts_with("r\"") || rest.starts_with("r#") => {
                let marks = rest[1..].bytes().take_while(|&byte| byte == b'#').count();
                if rest[1 + marks..].starts_with('"') {
                    return (marks + 2, Self::RawText(marks));
                }
                code.push('r');
                (1, self)
            }
            Self::Code if rest.starts_with('"') => (1, Self::Text),
            Self::Code => {
                code.push_str(&rest[..width]);
                (width, self)
            }
            Self::BlockComment if rest.starts_with("*/") => (2, Self::Code),
            Self::Text if rest.starts_with('\\') => ((1 + rest[1..].chars().next().map_or(0, char::len_utf8)), self),
            Self::Text if rest.starts_with('"') => (1, Self::Code),
            Self::RawText(marks) if rest.starts_with(&format!("\"{}", "#".repeat(marks))) => (1 + marks, Self::Code),
            Self::BlockComment | Self::Text | Self::RawText(_) => (width, self),
        }
    }
}

/// Whether `text` holds `word`, not as a part of a longer word.
fn has_word(text: &str, word: &str) -> bool {
    let is_part = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    text.match_indices(word).any(|(at, _)| {
        let bytes = text.as_bytes();
        let (before, after) = (bytes[..at].last(), bytes[at + word.len()..].first());
        !is_part(before) && !is_part(after)
    })
}

/// Every text file of the repository, except what is built and what is ignored.
fn repository() -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    walk(top, "", &mut sources);
    assert!(sources.len() > 20, "the repository was not found at {}", top.display());
    sources
}

fn walk(dir: &Path, prefix: &str, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = format!("{prefix}{name}");
        let kind = entry.file_type().unwrap();
        if name == ".git" || name == "target" {
            continue;
        }
        if kind.is_dir() {
            walk(&entry.path(), &format!("{path}/"), sources);
        } else if kind.is_file()
            && let Ok(text) = fs::read_to_string(entry.path())
        {
            sources.push(Source { path, text });
        }
    }
}

/// A file that grows beyond this has more than one noun in it.
const MOST_LINES: usize = 800;

fn files_are_short(sources: &[Source]) -> Vec<String> {
    let too_long = |source: &&Source| source.is_rust() && source.text.lines().count() > MOST_LINES;
    sources.iter().filter(too_long).map(|s| s.complain(MOST_LINES, "longer than 800 lines")).collect()
}

fn unsafe_is_in_sys(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust()) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (number, code) in source.code() {
            if !has_word(&code, "unsafe") {
                continue;
            }
            if !source.path.ends_with("/sys.rs") {
                complaints.push(source.complain(number, "`unsafe` outside of sys.rs"));
            }
            let above = lines[..number].iter().rev().take_while(|line| line.trim_start().starts_with("//"));
            if !above.into_iter().any(|line| line.contains("SAFETY:")) {
                complaints.push(source.complain(number, "`unsafe` without a SAFETY line above it"));
            }
        }
    }
    complaints
}

fn nothing_is_left_to_do(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust()) {
        for (number, code) in source.code() {
            for word in ["todo", "unimplemented", "dbg"] {
                if has_word(&code, word) && code.contains(&format!("{word}!")) {
                    complaints.push(source.complain(number, &format!("`{word}!`")));
                }
            }
        }
    }
    complaints
}

fn modules_are_documented(sources: &[Source]) -> Vec<String> {
    let undocumented = |source: &&Source| source.is_rust() && !source.text.starts_with("//!");
    let complain = |source: &Source| source.complain(0, "does not begin with a doc comment that says what it is");
    sources.iter().filter(undocumented).map(complain).collect()
}

/// A crate's first page says what each of its modules is for.
fn maps_name_every_module(sources: &[Source]) -> Vec<String> {
    let is_root = |source: &&Source| source.path.ends_with("src/lib.rs") || source.path == "vm-tests/src/main.rs";
    let mut complaints = Vec::new();
    for source in sources.iter().filter(is_root) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let declared = line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ");
            let Some(module) = declared.and_then(|declared| declared.strip_suffix(';')) else { continue };
            let of_tests = number > 0 && lines[number - 1] == "#[cfg(test)]";
            let named = |line: &&str| line.starts_with("//!") && line.contains(&format!("`{module}`"));
            if !of_tests && !lines.iter().any(named) {
                complaints.push(source.complain(number, &format!("the map above does not name `{module}`")));
            }
        }
    }
    complaints
}

fn designs_are_shown(sources: &[Source]) -> Vec<String> {
    let pages = sources.iter().filter(|source| source.path.starts_with("src/design/") && source.path.ends_with(".md"));
    // A macro may put the path together, so the name is looked for on its own, in a file that includes something.
    let is_included = |page: &Source| {
        let name = page.path.rsplit('/').next().unwrap_or_default();
        let literals = [format!("\"{name}\""), format!("\"design/{name}\"")];
        let names_it = |line: &str| !line.trim_start().starts_with("//") && literals.iter().any(|l| line.contains(l));
        let includes = |source: &&Source| source.code().iter().any(|(_, code)| code.contains("include_str!"));
        let sources = sources.iter().filter(|source| source.path.starts_with("src/") && source.is_rust());
        sources.filter(includes).any(|source| source.text.lines().any(names_it))
    };
    pages.filter(|page| !is_included(page)).map(|page| page.complain(0, "not included in the documentation")).collect()
}

/// The names in backticks at the beginning of the list items of the contract's methods.
fn rules_of(contract: &str) -> impl Iterator<Item = &str> {
    let item = |line: &'_ str| -> Option<(usize, usize)> {
        let start = line.find("/// * `")? + "/// * `".len();
        Some((start, start + line[start..].find("`: ")?))
    };
    contract.lines().filter_map(move |line| item(line).map(|(start, end)| &line[start..end]))
}

fn rules_have_cases(sources: &[Source]) -> Vec<String> {
    let cases: String =
        sources.iter().filter(|s| s.path.starts_with("backends/conformance/src/cases")).map(|s| &*s.text).collect();
    let contract = sources.iter().filter(|source| source.path == "backends/api/src/backend.rs");
    let missing = |source: &Source| {
        let untested = |rule: &&str| !cases.contains(&format!("fn {rule}("));
        let complain = |rule| source.complain(0, &format!("the rule `{rule}` has no case"));
        rules_of(&source.text).filter(untested).map(complain).collect::<Vec<_>>()
    };
    contract.flat_map(missing).collect()
}

fn one_file_names_the_backends(sources: &[Source]) -> Vec<String> {
    let shared = ["api", "conformance"];
    let backends: BTreeSet<&str> = sources.iter().filter_map(Source::backend).filter(|n| !shared.contains(n)).collect();
    let mut complaints = Vec::new();
    for source in sources.iter().filter(|source| source.is_product() && source.path != "src/stores.rs") {
        for (number, code) in source.code() {
            for backend in backends.iter().filter(|backend| source.backend() != Some(**backend)) {
                if has_word(&code, &format!("fsnap_{}", backend.replace('-', "_"))) {
                    complaints.push(source.complain(number, &format!("names the backend {backend}")));
                }
            }
        }
    }
    complaints
}

/// What a command takes from its environment is found in one file, and the library takes nothing.
fn one_file_reads_the_environment(sources: &[Source]) -> Vec<String> {
    let is_other = |source: &&Source| source.path.starts_with("src/") && source.path != "src/cli/environment.rs";
    let mut complaints = Vec::new();
    for source in sources.iter().filter(is_other).filter(|source| source.is_rust()) {
        let reads = |(_, code): &(usize, String)| {
            ["env::var", "env::var_os", "env::vars", "env::vars_os"].iter().any(|call| has_word(code, call))
        };
        let found = source.code().into_iter().filter(reads);
        complaints.extend(found.map(|(number, _)| source.complain(number, "the environment is read elsewhere")));
    }
    complaints
}

fn words_are_ours(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources.iter().filter(|s| s.path != "tests/tidy.rs" && (s.is_rust() || s.path.ends_with(".md"))) {
        for (number, line) in source.text.lines().enumerate() {
            let lower = line.to_lowercase();
            let of_lvm = lower.contains("lvm");
            if has_word(&lower, "volume group") && !of_lvm {
                complaints.push(source.complain(number, "\"volume group\": the word is checkpoint, or volumes"));
            }
            if lower.contains("snapshotter") {
                complaints.push(source.complain(number, "\"snapshotter\": the word is backend"));
            }
        }
        let type_names = source.code().into_iter().filter(|(_, code)| {
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            words.into_iter().any(|word| word.ends_with("Manager"))
        });
        complaints
            .extend(type_names.filter(|_| source.is_rust()).map(|(n, _)| source.complain(n, "a Manager: of what?")));
    }
    complaints
}

fn lines_end_well(sources: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for source in sources {
        let trailing = source.text.lines().enumerate().filter(|(_, line)| line.ends_with([' ', '\t', '\r']));
        complaints.extend(trailing.map(|(number, _)| source.complain(number, "white space at the end of the line")));
        if !source.text.is_empty() && !source.text.ends_with('\n') {
            complaints.push(source.complain(source.text.lines().count() - 1, "no newline at the end of the file"));
        }
    }
    complaints
}

fn nothing_names_a_machine(sources: &[Source]) -> Vec<String> {
    let absolute = ["/work", "/home", "/root", "/Users"];
    let hosts = ["crates.io", "pypi.org", "registry.npmjs", "proxy.golang"];
    let public_index = "registry+https://github.com/rust-lang/crates.io-index";
    let mut complaints = Vec::new();
    for source in sources.iter().filter(|source| source.path != "tests/tidy.rs") {
        let is_lock = source.path == "Cargo.lock";
        for (number, line) in source.text.lines().enumerate() {
            for path in absolute {
                let starts_a_path =
                    |at: usize| !line[..at].ends_with(|c: char| c.is_alphanumeric() || ".~-_/}".contains(c));
                if line.match_indices(&format!("{path}/")).any(|(at, _)| starts_a_path(at)) {
                    complaints.push(source.complain(number, &format!("the path {path} of one machine")));
                }
            }
            if is_lock && line.starts_with("source = ") && !line.contains(public_index) {
                complaints.push(source.complain(number, "a package of a private registry"));
            }
            if let Some(host) = hosts.iter().find(|host| !is_lock && line.contains(**host)) {
                complaints.push(source.complain(number, &format!("the host {host} of a registry")));
            }
        }
    }
    complaints
}

fn the_top_is_small(sources: &[Source]) -> Vec<String> {
    let allowed =
        ["Cargo.toml", "Cargo.lock", "src", "backends", "tests", "vm-tests", "README.md", "LICENSE", "Makefile"];
    let names: BTreeSet<&str> = sources.iter().map(|s| s.path.split('/').next().unwrap_or_default()).collect();
    let extra = names.into_iter().filter(|name| !name.starts_with('.') && !allowed.contains(name));
    extra.map(|name| format!("{name}: does not belong to the top level")).collect()
}

/// A rule, by the name of its function.
macro_rules! rules {
    ($($rule:ident),+ $(,)?) => {
        mod repository_keeps {
            $(#[test]
            fn $rule() {
                let complaints = super::$rule(&super::repository());
                assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
            })+
        }

        const RULES: &[&str] = &[$(stringify!($rule)),+];
    };
}

rules![
    files_are_short,
    unsafe_is_in_sys,
    nothing_is_left_to_do,
    modules_are_documented,
    maps_name_every_module,
    designs_are_shown,
    rules_have_cases,
    one_file_names_the_backends,
    one_file_reads_the_environment,
    words_are_ours,
    lines_end_well,
    nothing_names_a_machine,
    the_top_is_small,
];

mod rule_catches {
    use super::*;

    /// The number of complaints about one source.
    fn about(rule: fn(&[Source]) -> Vec<String>, path: &str, text: &str) -> usize {
        rule(&[Source { path: path.into(), text: text.into() }]).len()
    }

    #[test]
    fn files_are_short() {
        assert_eq!(about(super::files_are_short, "src/a.rs", &"\n".repeat(800)), 0);
        assert_eq!(about(super::files_are_short, "backends/btrfs/src/a.rs", &"\n".repeat(801)), 1);
    }

    #[test]
    fn unsafe_is_in_sys() {
        let rule = super::unsafe_is_in_sys;
        let block = "    // SAFETY: it is.\n    unsafe { call() }\n";
        assert_eq!(about(rule, "backends/btrfs/src/sys.rs", block), 0);
        assert_eq!(about(rule, "backends/btrfs/src/store.rs", block), 1);
        assert_eq!(about(rule, "backends/btrfs/src/sys.rs", "unsafe { call() }\n"), 1);
        let harmless = "// unsafe\n#![allow(unsafe_code)]\n/* unsafe\nunsafe */\nlet a = \"unsafe\";\nlet b = r#\"unsafe \" \"#;\n";
        assert_eq!(about(rule, "src/a.rs", harmless), 0);
        assert_eq!(about(rule, "src/a.rs", "let a = '\"'; unsafe { b() }\n"), 2);
    }

    #[test]
    fn nothing_is_left_to_do() {
        let rule = super::nothing_is_left_to_do;
        assert_eq!(
            about(rule, "src/a.rs", "fn a() { todo!() }\nfn b() { dbg!(1); }\nfn c() { unimplemented!() }\n"),
            3
        );
        assert_eq!(about(rule, "src/a.rs", "// todo!()\nlet todo = \"todo!()\";\n"), 0);
    }

    #[test]
    fn modules_are_documented() {
        assert_eq!(about(super::modules_are_documented, "src/cli/log.rs", "//! Lists checkpoints.\n"), 0);
        assert_eq!(about(super::modules_are_documented, "src/cli/log.rs", "use clap::Args;\n"), 1);
    }

    #[test]
    fn maps_name_every_module() {
        let rule = super::maps_name_every_module;
        let map = "//! * `store`: the store; [`tree`](mod@tree): a tree.\n\nmod store;\npub mod tree;\n";
        assert_eq!(about(rule, "backends/a/src/lib.rs", map), 0);
        assert_eq!(about(rule, "backends/a/src/lib.rs", &format!("{map}// `lock`\nmod lock;\n")), 1);
        assert_eq!(about(rule, "backends/a/src/lib.rs", &format!("{map}#[cfg(test)]\nmod tests;\n")), 0);
        assert_eq!(about(rule, "backends/a/src/store.rs", "//! The store.\n\nmod lock;\n"), 0);
    }

    #[test]
    fn designs_are_shown() {
        let page = Source { path: "src/design/why.md".into(), text: "# Why\n".into() };
        let including = |text: &str| Source { path: "src/design.rs".into(), text: text.into() };
        let shown = including("#![doc = include_str!(\"design/why.md\")]\n");
        assert_eq!(super::designs_are_shown(&[page.clone(), shown]).len(), 0);
        let by_macro = including("#[doc = include_str!(concat!(\"design/\", $file))]\npage!(why, \"why.md\");\n");
        assert_eq!(super::designs_are_shown(&[page.clone(), by_macro]).len(), 0);
        let another = including("page!(what, include_str!(\"what.md\"));\n// \"why.md\"\n");
        assert_eq!(super::designs_are_shown(&[page.clone(), another]).len(), 1);
        assert_eq!(super::designs_are_shown(&[page, including("//! See design/why.md.\n")]).len(), 1);
    }

    #[test]
    fn rules_have_cases() {
        let contract = "    /// * `snapshot_is_complete`: it is.\n    /// Not `a_rule`: this.\n";
        let contract = Source { path: "backends/api/src/backend.rs".into(), text: contract.into() };
        let cases = |text: &str| Source { path: "backends/conformance/src/cases/a.rs".into(), text: text.into() };
        let tested = cases("fn snapshot_is_complete(site: &mut Site) {}\n");
        assert_eq!(super::rules_have_cases(&[contract.clone(), tested]).len(), 0);
        assert_eq!(super::rules_have_cases(&[contract, cases("// snapshot_is_complete\n")]).len(), 1);
        let real = super::repository().into_iter().find(|s| s.path == "backends/api/src/backend.rs").unwrap();
        assert!(rules_of(&real.text).count() > 30, "the rules of the contract were not found");
    }

    #[test]
    fn one_file_names_the_backends() {
        let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
        let complaints = |path: &str| {
            let uses = "use fsnap_dm_thin::Store;\n// fsnap_dm_thin\n";
            super::one_file_names_the_backends(&[source("backends/dm-thin/src/lib.rs", "\n"), source(path, uses)]).len()
        };
        assert_eq!(complaints("src/stores.rs"), 0);
        assert_eq!(complaints("backends/dm-thin/src/store.rs"), 0);
        assert_eq!(complaints("src/coordinator.rs"), 1);
        assert_eq!(complaints("backends/rsync/src/store.rs"), 1);
    }

    #[test]
    fn one_file_reads_the_environment() {
        let rule = super::one_file_reads_the_environment;
        assert_eq!(about(rule, "src/cli/hook.rs", "let a = std::env::var_os(\"A\");\nlet b = env::var(\"B\");\n"), 2);
        assert_eq!(about(rule, "src/cli/hook.rs", "// env::var\nlet c = std::env::current_dir();\n"), 0);
        assert_eq!(about(rule, "src/cli/environment.rs", "let a = std::env::var_os(\"A\");\n"), 0);
    }

    #[test]
    fn words_are_ours() {
        let rule = super::words_are_ours;
        assert_eq!(about(rule, "src/a.rs", "// A volume group.\nstruct StoreManager;\n// the Snapshotter\n"), 3);
        assert_eq!(about(rule, "README.md", "The LVM volume group that holds the pool.\n"), 0);
        assert_eq!(about(rule, "README.md", "Use your package manager.\n"), 0);
    }

    #[test]
    fn lines_end_well() {
        assert_eq!(about(super::lines_end_well, "README.md", "a \nb\t\nc\n"), 2);
        assert_eq!(about(super::lines_end_well, "src/a.rs", "//! A"), 1);
        assert_eq!(about(super::lines_end_well, "src/a.rs", "//! A\n"), 0);
    }

    #[test]
    fn nothing_names_a_machine() {
        let rule = super::nothing_names_a_machine;
        assert_eq!(about(rule, "src/a.rs", "let a = \"/work/x\";\n// see /home/me/y\n"), 2);
        assert_eq!(about(rule, "src/a.rs", "let a = dir.join(\"net/work/x\"); // ~/work/, home/, {}/work/\n"), 0);
        assert_eq!(about(rule, "src/a.rs", "// from index.crates.io\n"), 1);
        let lock = |host: &str| format!("source = \"registry+https://{host}\"\n");
        assert_eq!(about(rule, "Cargo.lock", &lock("github.com/rust-lang/crates.io-index")), 0);
        assert_eq!(about(rule, "Cargo.lock", &lock("mirror.example/index")), 1);
    }

    #[test]
    fn the_top_is_small() {
        assert_eq!(about(super::the_top_is_small, "scripts/run.sh", "\n"), 1);
        assert_eq!(about(super::the_top_is_small, ".rustfmt.toml", "\n"), 0);
        assert_eq!(about(super::the_top_is_small, "tests/tidy.rs", "\n"), 0);
    }

    /// A rule that nothing can break is no rule.
    #[test]
    fn every_rule_has_its_bad_example() {
        let own = super::repository().into_iter().find(|source| source.path == "tests/tidy.rs").unwrap();
        let (_, examples) = own.text.split_once("mod rule_catches").unwrap();
        for rule in RULES {
            assert!(examples.contains(&format!("fn {rule}()")), "{rule} has no bad example");
        }
    }
}
