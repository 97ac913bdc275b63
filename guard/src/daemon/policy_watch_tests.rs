//! Owns the tests of `watch`: an edit in place, an editor's rename, a ConfigMap's symlink swap, a file that goes away.

use std::{fs, os::unix::fs::symlink, path::Path};

use super::*;

const GOOD: &str = include_str!("../../../deploy/policies/worker.yaml");

fn named(name: &str) -> String {
    GOOD.replace("name: worker", &format!("name: {name}"))
}

struct Watched {
    edits: mpsc::Receiver<Edit>,
    task: tokio::task::JoinHandle<()>,
}

impl Watched {
    fn start(path: &Path) -> Watched {
        let (sender, edits) = mpsc::channel(8);
        let last = load(path, &NodeFacts::default());
        Watched { edits, task: tokio::spawn(watch(path.to_path_buf(), NodeFacts::default(), last, sender)) }
    }

    async fn next(&mut self) -> Edit {
        tokio::time::timeout(Duration::from_secs(10), self.edits.recv())
            .await
            .expect("an edit in time")
            .expect("a running watch")
    }

    async fn name(&mut self) -> String {
        self.next().await.expect("a good document").ruleset.name.clone()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn an_edit_a_rename_and_a_broken_one_are_seen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.yaml");
    fs::write(&path, named("one")).unwrap();
    let mut watched = Watched::start(&path);
    tokio::time::sleep(Duration::from_millis(50)).await;

    fs::write(&path, named("two")).unwrap();
    assert_eq!(watched.name().await, "two");

    fs::write(directory.path().join("new"), named("three")).unwrap();
    fs::rename(directory.path().join("new"), &path).unwrap();
    assert_eq!(watched.name().await, "three");

    fs::write(&path, "spec: [").unwrap();
    let rejected = watched.next().await.expect_err("broken");
    assert_eq!(rejected.diagnostics[0].id, "NG002");

    fs::remove_file(&path).unwrap();
    let rejected = watched.next().await.expect_err("gone");
    assert_eq!(rejected.diagnostics[0].id, "NG001");

    fs::write(&path, named("four")).unwrap();
    assert_eq!(watched.name().await, "four");
}

#[tokio::test]
async fn a_config_map_swap_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    // The layout of a ConfigMap volume: the file links into `..data`, which links to a directory that is replaced as a whole.
    for version in ["one", "two"] {
        fs::create_dir(at(&format!("..{version}"))).unwrap();
        fs::write(at(&format!("..{version}/policy.yaml")), named(version)).unwrap();
    }
    symlink("..one", at("..data")).unwrap();
    symlink("..data/policy.yaml", at("policy.yaml")).unwrap();
    let mut watched = Watched::start(&at("policy.yaml"));
    tokio::time::sleep(Duration::from_millis(50)).await;

    symlink("..two", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    fs::remove_dir_all(at("..one")).unwrap();
    assert_eq!(watched.name().await, "two");
}
