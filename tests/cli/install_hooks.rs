//! `fsnap install-hooks`: what it changes, and when it refuses.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use crate::site::Site;

/// A site whose CRIU says that it has this version.
fn with_criu(version: &str) -> Site {
    let mut site = Site::empty();
    let criu = site.path("criu");
    fs::write(&criu, format!("#!/bin/sh\necho 'Version: {version}'\n")).unwrap();
    fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
    site.set("FSNAP_CRIU", criu.to_str().unwrap());
    site
}

#[test]
fn it_can_be_taken_back() {
    let site = with_criu("4.2");
    site.run("mkdir -p root/etc/criu && echo 'log-level 4' >root/etc/criu/default.conf && cp -r root before");
    let told = site.run("fsnap install-hooks criu --root root");
    assert!(
        told.contains("write root/etc/criu/default.conf: action-script /usr/libexec/fsnap/fsnap-criu-hook"),
        "{told}"
    );
    let config = fs::read_to_string(site.path("root/etc/criu/default.conf")).unwrap();
    assert!(config.starts_with("log-level 4\n# These lines are fsnap's"), "{config}");
    // The link is fsnap by the name that makes it the action script: it says that CRIU did not call it.
    let said = site.fail("root/usr/libexec/fsnap/fsnap-criu-hook");
    assert!(said.contains("CRTOOLS_SCRIPT_ACTION is not set"), "{said}");
    assert_eq!(site.run("fsnap install-hooks criu --root root"), "");
    site.run("fsnap install-hooks criu --root root --uninstall");
    site.run("find root -type d -empty -delete; diff -r root before");
}

#[test]
fn a_dry_run_changes_nothing() {
    let site = with_criu("4.2");
    let told = site.run("fsnap install-hooks criu --root root -n");
    assert_eq!(told.lines().count(), 2, "{told}");
    assert!(!site.path("root").exists());
}

#[test]
fn a_criu_that_would_abort_gets_no_hook() {
    let site = with_criu("3.17.1");
    let said = site.fail("fsnap install-hooks criu --root root");
    assert!(
        said.contains("has version 3.17.1, and 3.19.0 is needed: an older one that a container runtime calls aborts"),
        "{said}"
    );
    assert!(!site.path("root").exists());
    // What is there can be removed all the same.
    site.run("fsnap install-hooks criu --root root --uninstall && fsnap install-hooks podman --root root --uninstall");
}
