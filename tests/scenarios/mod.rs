mod api;
mod dependencies;
mod faults;
mod golden;
mod membership;
mod observe;
mod split;
mod up;
