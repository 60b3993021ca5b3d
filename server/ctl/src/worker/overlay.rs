//! The step that mounts the overlay on the store, through mountd, which takes care of it.

use std::time::Duration;

use async_trait::async_trait;
use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse, OverlayInfo};
use rustix::mount::{UnmountFlags, unmount};

use super::busy;
use super::error::WorkerError;
use super::mountinfo::{self, Device, mount_on};
use super::record::Record;
use super::settings::Settings;
use super::step::{State, Step};
use crate::control::{self, ControlError};

/// How long mounting or unmounting may take: the kernel waits for writes to an upper directory.
const LIMIT: Duration = Duration::from_secs(60);

/// The overlay.
pub(super) struct Overlay {
    settings: Settings,
}

/// The device of the overlay over our view that is mounted on the store, if it is.
pub(super) fn device(settings: &Settings) -> Option<Device> {
    let mount = mount_on(&settings.store).ok()??;
    let ours = mount.fs_type == "overlay" && mount.has(&format!("lowerdir={}", settings.view().display()));
    ours.then(|| mountinfo::device(&mount.device, 10)).flatten()
}

pub(super) fn is_mounted(settings: &Settings) -> bool {
    device(settings).is_some()
}

impl Overlay {
    pub(super) const NAME: &str = "overlay";

    pub(super) fn new(settings: &Settings) -> Self {
        Self { settings: settings.clone() }
    }

    async fn ask(&self, request: &ControlRequest) -> Result<ControlResponse, ControlError> {
        control::ask(&self.settings.control(), request, LIMIT).await
    }

    /// Whether mountd has it in its care.
    async fn in_care(&self) -> Result<Option<OverlayInfo>, ControlError> {
        match self.ask(&ControlRequest::OverlayList).await? {
            ControlResponse::Overlays { overlays } => {
                Ok(overlays.into_iter().find(|overlay| overlay.merged == self.settings.store))
            }
            _ => Err(ControlError::Mismatch),
        }
    }

    fn unmount(&self, lazy: bool) -> Result<(), WorkerError> {
        let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        match unmount(&self.settings.store, flags | UnmountFlags::NOFOLLOW) {
            Err(rustix::io::Errno::BUSY) => Err(self.busy()),
            unmounted => unmounted.map_err(WorkerError::system("unmount", &self.settings.store)),
        }
    }

    fn busy(&self) -> WorkerError {
        let holders = device(&self.settings).map(|device| busy::scan(&busy::Where::On(device), &[]).holders);
        WorkerError::Busy { store: self.settings.store.clone(), holders: holders.unwrap_or_default() }
    }
}

#[async_trait]
impl Step for Overlay {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    async fn check(&self) -> State {
        match (is_mounted(&self.settings), self.in_care().await) {
            (false, _) => State::Down,
            (true, Ok(Some(overlay))) if overlay.store_uri == self.settings.overlay_uri() => State::Up,
            (true, Ok(Some(overlay))) => State::Broken(format!("it is another one, {}", overlay.store_uri)),
            (true, Ok(None)) => State::Broken("it is mounted, and mountd does not take care of it".to_owned()),
            (true, Err(error)) => State::Broken(format!("it is mounted, and mountd does not say more: {error}")),
        }
    }

    async fn apply(&self, _: &mut Record) -> Result<Vec<String>, WorkerError> {
        let merged = self.settings.store.clone();
        let (upper, work) = (self.settings.upper(), self.settings.work());
        let adopt = ControlRequest::OverlayAdopt { merged: merged.clone() };
        let mount = ControlRequest::OverlayUp { upper, work, merged, view: None };
        let answer = if is_mounted(&self.settings) {
            match self.ask(&adopt).await {
                // Over the view of a daemon that is gone: it is mounted anew.
                Err(ControlError::Refused { .. }) => self.ask(&mount).await?,
                answer => answer?,
            }
        } else {
            self.ask(&mount).await?
        };
        let ControlResponse::Overlay(overlay) = answer else { return Err(ControlError::Mismatch.into()) };
        if overlay.store_uri != self.settings.overlay_uri() {
            let (found, expected) = (overlay.store_uri, self.settings.overlay_uri());
            return Err(WorkerError::refused(
                format!("mountd says that the store is {found}, where it was to be {expected}"),
                "are narlake and narlake-mountd of the same version?",
            ));
        }
        Ok(Vec::new())
    }

    async fn undo(&self, _: &mut Record, lazy: bool) -> Result<Vec<String>, WorkerError> {
        if !is_mounted(&self.settings) {
            return Ok(Vec::new());
        }
        let merged = self.settings.store.clone();
        match self.ask(&ControlRequest::OverlayDown { merged, lazy }).await {
            Ok(_) => Ok(Vec::new()),
            Err(ControlError::Refused { kind: ControlErrorKind::Busy, .. }) => Err(self.busy()),
            // A daemon that is gone, or does not know it, does not have to be asked.
            Err(error)
                if error.is_absent()
                    || matches!(error, ControlError::Refused { kind: ControlErrorKind::NotFound, .. }) =>
            {
                self.unmount(lazy).map(|()| Vec::new())
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::settings::tests::below;

    #[tokio::test]
    async fn nothing_is_mounted_yet() {
        let dir = tempfile::tempdir().unwrap();
        let settings = below(dir.path());
        let step = Overlay::new(&settings);
        assert_eq!(step.check().await, State::Down);
        assert!(step.undo(&mut Record::new(settings), true).await.unwrap().is_empty());
    }
}
