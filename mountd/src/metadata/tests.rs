use narlake_format::id::TableId;
use narlake_format::lake::strings::StringTable;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::{StoreDir, StorePath};
use tempfile::TempDir;

use super::*;
use crate::trust::tests::info;

struct World {
    dir: TempDir,
    key: SecretKey,
    metrics: Metrics,
}

impl World {
    fn new() -> Self {
        let (dir, key) = (tempfile::tempdir().unwrap(), SecretKey::generate("test-1", [7; 32]).unwrap());
        fs::create_dir(dir.path().join("tmp")).unwrap();
        Self { dir, key, metrics: Metrics::new() }
    }

    fn open(&self, bytes_max: u64) -> Metadata {
        let keys = TrustedKeys::new(StoreDir::default(), vec![self.key.public()]);
        Metadata::open(self.dir.path(), bytes_max, keys, &self.metrics).unwrap()
    }

    fn record(&self, name: &str, key: &SecretKey) -> PathRecord {
        let hash = StorePathHash::from_bytes(Sha256Hash::of(name.as_bytes()).as_bytes()[..20].try_into().unwrap());
        let path = StorePath { hash, name: name.parse().unwrap() };
        let info = NarInfo { deriver: Some(path.clone()), ..info(path, Vec::new()) };
        let manifest = narlake_format::id::ManifestId::of(b"manifest");
        let mut record = PathRecord::new(info, manifest, &StringTable::default());
        record.sign(&StoreDir::default(), key);
        record
    }

    /// Every file, with its content.
    fn files(&self) -> Vec<PathBuf> {
        let shards = fs::read_dir(self.dir.path().join("metadata")).unwrap();
        let mut files: Vec<PathBuf> = shards
            .flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap())
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        files
    }
}

fn blob(number: u32) -> (BlobId, Vec<u8>) {
    let bytes = format!("blob {number}").into_bytes();
    (TableId::of(&bytes).into(), bytes)
}

#[test]
fn what_is_kept_is_there_in_the_next_life() {
    let world = World::new();
    let record = world.record("kept", &world.key);
    let (hash, (id, bytes)) = (record.info().store_path.hash, blob(1));
    {
        let metadata = world.open(1 << 20);
        assert!(metadata.record(&hash).is_none() && metadata.blob(BlobKind::Table, &id).is_none());
        metadata.keep_record(&record);
        metadata.keep_blob(&id, &bytes);
    }
    let metadata = world.open(1 << 20);
    assert_eq!(metadata.record(&hash), Some(record));
    assert_eq!(metadata.blob(BlobKind::Table, &id), Some(bytes.into()));
    assert_eq!(metadata.bytes(), 2 * BLOCK);
    metadata.forget_record(&hash);
    assert!(metadata.record(&hash).is_none() && !metadata.has_record(&hash));
    // Bytes of another kind never stand for it.
    assert!(metadata.blob(BlobKind::Part, &id).is_none());
    assert!(world.files().is_empty());
}

/// Each byte flipped, and each cut: a miss, and gone.
#[test]
fn what_does_not_verify_is_a_miss() {
    let world = World::new();
    let record = world.record("damaged", &world.key);
    let (hash, (id, bytes)) = (record.info().store_path.hash, blob(1));
    let metadata = world.open(1 << 20);
    let check = |change: &dyn Fn(&mut Vec<u8>, usize)| {
        metadata.keep_record(&record);
        metadata.keep_blob(&id, &bytes);
        let longest = world.files().iter().map(|file| fs::read(file).unwrap().len()).max().unwrap();
        for at in 0..longest {
            metadata.keep_record(&record);
            metadata.keep_blob(&id, &bytes);
            let mut changed = [false; 2];
            for file in world.files() {
                let mut content = fs::read(&file).unwrap();
                if at < content.len() {
                    change(&mut content, at);
                    fs::write(&file, content).unwrap();
                    changed[usize::from(file == Name::Record(hash).path(&metadata.dir))] = true;
                }
            }
            assert_eq!(metadata.blob(BlobKind::Table, &id).is_none(), changed[0], "{at}");
            assert_eq!(metadata.record(&hash).is_none(), changed[1], "{at}");
        }
    };
    check(&|content, at| content[at] ^= 1);
    check(&|content, at| content.truncate(at));
    assert!(world.metrics.cache_damaged.get() > 100);
}

#[test]
fn records_of_others_are_not_believed() {
    let world = World::new();
    let other = SecretKey::generate("test-1", [8; 32]).unwrap();
    let (forged, record) = (world.record("forged", &other), world.record("record", &world.key));
    let metadata = world.open(1 << 20);
    metadata.keep_record(&forged);
    assert!(metadata.record(&forged.info().store_path.hash).is_none());
    // A record under the name of another path.
    metadata.keep_record(&record);
    let there = world.record("there", &world.key).info().store_path.hash;
    metadata.keep_record(&world.record("there", &world.key));
    fs::copy(Name::Record(record.info().store_path.hash).path(&metadata.dir), Name::Record(there).path(&metadata.dir))
        .unwrap();
    assert!(metadata.record(&there).is_none());
}

#[test]
fn room_is_made() {
    let world = World::new();
    let metadata = world.open(20 * BLOCK);
    for number in 0..200 {
        let (id, bytes) = blob(number);
        metadata.keep_blob(&id, &bytes);
        assert!(metadata.bytes() <= 20 * BLOCK);
        assert!(world.files().len() <= 20);
    }
    let there = (0..200).filter(|number| metadata.blob(BlobKind::Table, &blob(*number).0).is_some()).count();
    assert!((10..=20).contains(&there), "{there}");
    assert_eq!(world.files().len(), there);
    drop(metadata);
    // A smaller one, and something that has no business here.
    let shard = world.files()[0].parent().unwrap().to_owned();
    fs::write(world.dir.path().join("metadata/stray"), b"x").unwrap();
    fs::write(shard.join("stray"), b"x").unwrap();
    let metadata = world.open(5 * BLOCK);
    assert!(metadata.bytes() <= 5 * BLOCK && world.files().len() <= 5);
    assert!(!shard.join("stray").exists() && !world.dir.path().join("metadata/stray").exists());
}

/// A disk that takes nothing: it is used and not kept.
#[test]
fn a_full_disk_is_no_error() {
    let world = World::new();
    let metadata = world.open(1 << 20);
    fs::remove_dir(world.dir.path().join("tmp")).unwrap();
    let (id, bytes) = blob(1);
    metadata.keep_blob(&id, &bytes);
    assert!(metadata.blob(BlobKind::Table, &id).is_none());
    assert_eq!(world.metrics.cache_not_kept.get(), 1);
}
