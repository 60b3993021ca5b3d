//! A NAR in one piece and in many is the same; one that is accepted is written again byte for byte.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::nar::{NarError, Reader, Writer};

fn copy<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<Vec<u8>, NarError> {
    let (mut reader, mut writer, mut out) = (Reader::new(), Writer::new(), Vec::new());
    for piece in pieces {
        reader.feed(piece, &mut |event| writer.event(event, &mut out))?;
    }
    reader.finish()?;
    writer.finish()?;
    Ok(out)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, nar) = input;
    let whole = copy(std::iter::once(nar));
    assert_eq!(copy(nar.chunks(usize::from(size) + 1)), whole);
    if let Ok(out) = whole {
        assert_eq!(out, nar);
    }
});
