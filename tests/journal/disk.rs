//! A folder as a disk may have it after a power failure: what was not synced is there, or not, or in part.

use std::collections::BTreeMap;

use crate::chance::Chance;
use crate::crash::Files;
use crate::syscalls::Call;

/// Is written whole or not at all.
const SECTOR: usize = 512;

#[derive(Clone, Default)]
struct File {
    now: Vec<u8>,
    synced: Vec<u8>,
}

type Names = BTreeMap<String, usize>;

/// See the module.
pub struct Disk {
    files: Vec<File>,
    /// The folder after each of its changes since it was last synced.
    folders: Vec<Names>,
}

/// How much of what was not synced is lost.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    All,
    SomeFiles,
    SomeSectors,
}

impl Disk {
    pub fn new() -> Disk {
        Disk { files: Vec::new(), folders: vec![Names::new()] }
    }

    fn names(&self) -> &Names {
        self.folders.last().expect("there is always one")
    }

    fn file(&mut self, name: &str) -> &mut File {
        let index = *self.names().get(name).unwrap_or_else(|| panic!("{name} was not seen to be created"));
        &mut self.files[index]
    }

    fn change_names(&mut self, change: impl FnOnce(&mut Names) -> Option<usize>) {
        let mut names = self.names().clone();
        change(&mut names);
        self.folders.push(names);
    }

    pub fn apply(&mut self, call: &Call) {
        match call {
            Call::Create(name) => {
                let index = self.files.len();
                self.files.push(File::default());
                self.change_names(|names| names.insert(name.clone(), index));
            }
            Call::Write { file, at, bytes } => {
                let now = &mut self.file(file).now;
                now.resize(now.len().max(at + bytes.len()), 0);
                now[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Call::Truncate { file, length } => self.file(file).now.resize(*length, 0),
            Call::Rename { from, to } => self.change_names(|names| {
                let index = names.remove(from).expect("it is there");
                names.insert(to.clone(), index)
            }),
            Call::Unlink(name) => self.change_names(|names| names.remove(name)),
            Call::Sync(name) => {
                let file = self.file(name);
                file.synced.clone_from(&file.now);
            }
            Call::SyncFolder => drop(self.folders.drain(..self.folders.len() - 1)),
        }
    }

    /// The files as processes see them, but the index of the write-ahead log.
    pub fn now(&self) -> Files {
        let names = self.names().iter().filter(|(name, _)| !name.ends_with("-shm"));
        names.map(|(name, index)| (name.clone(), self.files[*index].now.clone())).collect()
    }

    /// The files after a power failure.
    pub fn after(&self, loss: Loss, chance: &mut Chance) -> Files {
        let names = match loss {
            Loss::All => &self.folders[0],
            Loss::SomeFiles | Loss::SomeSectors => chance.pick(&self.folders),
        };
        names.iter().map(|(name, index)| (name.clone(), self.files[*index].after(loss, chance))).collect()
    }
}

impl File {
    fn after(&self, loss: Loss, chance: &mut Chance) -> Vec<u8> {
        let some = |chance: &mut Chance| if chance.percent(50) { &self.now } else { &self.synced };
        match loss {
            Loss::All => self.synced.clone(),
            Loss::SomeFiles => some(chance).clone(),
            Loss::SomeSectors => {
                let mut bytes = vec![0; some(chance).len()];
                for (number, sector) in bytes.chunks_mut(SECTOR).enumerate() {
                    let from = some(chance).get(number * SECTOR..).unwrap_or_default();
                    let length = sector.len().min(from.len());
                    sector[..length].copy_from_slice(&from[..length]);
                }
                bytes
            }
        }
    }
}
