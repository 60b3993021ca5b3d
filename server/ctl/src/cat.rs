//! `narlake cat`: one file of a store path in the lake, without mounting or downloading the rest.
//!
//! What arrives was verified by the server against its hashes; the length is checked here. Whoever needs more trusts a
//! key and mounts, or downloads the NAR.

use std::io::{self, Write as _};

use anyhow::{Context as _, bail};
use futures::StreamExt as _;

use crate::cli::CatOptions;
use crate::client::Client;
use crate::tree::Node;
use crate::{Verdict, object};

/// Runs the command.
///
/// # Errors
/// When the file is not there, is none, or the server does not answer.
pub async fn run(options: &CatOptions) -> anyhow::Result<Verdict> {
    let client = Client::new(&options.server.server, &options.server.access)?;
    let dir = client.info().await?.store_dir;
    let place = &options.place;
    let (object, node) = object::find(&client, &dir, place, true).await?;
    let Node::File { size, nar_offset, .. } = node else {
        bail!("{place} is a directory; `narlake ls` lists it");
    };
    let nar_offset = nar_offset.with_context(|| format!("the listing of {place} does not say where its content is"))?;
    let mut out = io::stdout().lock();
    if size > 0 {
        let mut content = std::pin::pin!(object.content(&client, nar_offset, size).await?);
        while let Some(piece) = content.next().await.transpose()? {
            out.write_all(&piece)?;
        }
    }
    out.flush()?;
    Ok(Verdict::Good)
}
