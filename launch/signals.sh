# Source it before torchrun or `accelerate launch`:  . launch/signals.sh
# Both read these variables as defaults of torchrun's options of the same names; an older torch, that has
# no such options, ignores them. Without them SIGUSR1 and SIGUSR2 kill the launcher (the ranks notice, and
# save), and ranks get 30 s for their last checkpoint.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export PET_SHUTDOWN_TIMEOUT=300
