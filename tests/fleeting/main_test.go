package conformance

import (
	_ "github.com/hashicorp/go-plugin"
	_ "gitlab.com/gitlab-org/fleeting/fleeting"
	_ "gitlab.com/gitlab-org/fleeting/fleeting/connector"
	_ "gitlab.com/gitlab-org/fleeting/fleeting/integration"
	_ "gitlab.com/gitlab-org/fleeting/taskscaler"
)
