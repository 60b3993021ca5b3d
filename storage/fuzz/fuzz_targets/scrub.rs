//! Scrubbing in one piece and in many is the same, and restoring gives back what was there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::lake::scrub::{Patch, PatchList, Restorer, Scrubber};
use narlake_format::lake::strings::StringTable;
use narlake_format::nix::store_path::StoreDir;

type Scrubbed = Vec<(Vec<u8>, Vec<Patch>)>;

fn scrub(files: &[&[u8]], piece: usize) -> (Scrubbed, StringTable) {
    let mut scrubber = Scrubber::new(&StoreDir::default());
    let mut scrubbed = Scrubbed::new();
    for file in files {
        let (mut out, mut patches) = (Vec::new(), Vec::new());
        for piece in file.chunks(piece) {
            scrubber.write(piece, &mut out, &mut patches);
        }
        scrubber.end(&mut out, &mut patches);
        scrubbed.push((out, patches));
    }
    (scrubbed, scrubber.finish())
}

fuzz_target!(|input: (u8, Vec<&[u8]>)| {
    let (piece, files) = input;
    let (scrubbed, table) = scrub(&files, usize::MAX);
    assert_eq!(scrub(&files, usize::from(piece) + 1), (scrubbed.clone(), table.clone()));
    assert_eq!(StringTable::decode(&table.encode()), Ok(table.clone()));
    for ((out, patches), file) in scrubbed.into_iter().zip(files) {
        let list = PatchList::resolve(&patches, &table, out.len() as u64).expect("patches of this file");
        let mut windows = out.clone();
        let length = usize::from(piece) + 1;
        for (number, window) in windows.chunks_mut(length).enumerate() {
            list.restore((number * length) as u64, window);
        }
        assert_eq!(windows, file);
        let mut whole = out;
        if !whole.is_empty() {
            let mut restorer = Restorer::new(&table);
            restorer.chunk(&mut whole, &patches).expect("patches of this file");
            restorer.finish().expect("patches of this file");
        }
        assert_eq!(whole, file);
    }
});
