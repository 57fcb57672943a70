/* An engine that fsnap does not know: it stops a process, writes its "image", and calls the hook at each step.
 * generic PID DIR FSNAP [fail] */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *pid, *dir, *fsnap;

/* Not by system(3): this process itself is the engine that fsnap watches. */
static int hook(const char *step)
{
	pid_t child = fork();
	if (child == 0) {
		execl(fsnap, "fsnap", "hook", "generic", step, "--tree", pid, "--images", dir, (char *)NULL);
		_exit(127);
	}
	int status;
	if (child < 0 || waitpid(child, &status, 0) != child)
		err(1, "hook");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

static void stop(pid_t process)
{
	char path[64], line[512];
	snprintf(path, sizeof path, "/proc/%d/stat", process);
	kill(process, SIGSTOP);
	for (;;) {
		FILE *stat = fopen(path, "r");
		if (!stat || !fgets(line, sizeof line, stat))
			err(1, "%s", path);
		fclose(stat);
		char *state = strrchr(line, ')');
		if (state && state[2] == 'T')
			return;
		usleep(1000);
	}
}

int main(int argc, char **argv)
{
	if (argc < 4)
		errx(2, "generic PID DIR FSNAP [fail]");
	pid = argv[1], dir = argv[2], fsnap = argv[3];
	pid_t process = atoi(pid);
	if (hook("starting"))
		errx(1, "no dump");
	stop(process);
	int images = open(dir, O_RDONLY | O_DIRECTORY);
	int image = openat(images, "image", O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (image < 0 || write(image, pid, strlen(pid)) < 0 || close(image))
		err(1, "image");
	int taken = hook("frozen");
	kill(process, SIGCONT);
	if (taken)
		errx(1, "the dump has failed");
	if (argc > 4)
		return hook("failed");
	return hook("resumed");
}
