# frozen_string_literal: true

# The application behind gitlab.ru: GitLab CE 8.x's API v3 as far as an authenticating gateway can tell, and what differs
# in API v4 (lists by keys, uploads). Tokens are
# looked up, lists paginated and errors worded as there; Grape, Kaminari and Rack are the real ones. The versions of
# the libraries are newer than GitLab 8's, so where their rules changed the old rule is written out here.
#
# Beside the API: GET /__seen lists the requests that arrived since the last DELETE /__seen.

require 'digest'
require 'json'
require 'grape'
require 'kaminari/core'
require_relative 'printable'

Kaminari.configure do |config|
  config.default_per_page = 20
  config.max_per_page = 100
end

module Backend
  # ---- Who asks ----

  # BACKEND_TOKENS, "token=user,token=user", as {token => user}. A token may itself contain "=".
  USERS = ENV.fetch('BACKEND_TOKENS') { abort 'gitlab.ru: set BACKEND_TOKENS=token=user,token=user' }
             .split(',')
             .to_h { |pair| pair.rpartition('=').values_at(0, 2) }
             .freeze
  if USERS.empty? || USERS.any? { |token, user| token.empty? || user.empty? }
    abort 'gitlab.ru: BACKEND_TOKENS must be token=user,token=user'
  end

  # GitLab's order. The parameter beats the header even if it is wrong, and an empty parameter counts as one, because
  # an empty string is true in Ruby. Only then an OAuth token, of which blank ones are skipped.
  def self.user_for(params, env)
    USERS[(params['private_token'] || env['HTTP_PRIVATE_TOKEN']).to_s] || USERS[oauth_token(params, env)]
  end

  def self.oauth_token(params, env)
    bearer = env['HTTP_AUTHORIZATION'].to_s[/\ABearer (.*)/i, 1]
    [params['access_token'], bearer, params['bearer_token']].map(&:to_s).find { |token| !token.strip.empty? }
  end

  # ---- What there is ----

  CREATED_AT = '2015-06-01T12:00:00.000Z'

  def self.project(id)
    path = case id
           when 1 then 'project'
           when 2 then 'dotted.name' # only routes that allow dots in the id find this one by path
           else "project-#{id}"
           end
    {
      id: id, description: "Project number #{id}", default_branch: 'master', public: false, visibility_level: 0,
      web_url: "http://gitlab.test/group/#{path}", name: path, name_with_namespace: "group / #{path}", path: path,
      path_with_namespace: "group/#{path}", issues_enabled: true, archived: false, created_at: CREATED_AT
    }.freeze
  end

  # In the order of their ids, not newest first as GitLab has them: tests can then tell a page by its first id.
  PROJECTS = (1..253).map { |id| project(id) }.freeze
  BY_PATH = PROJECTS.to_h { |project| [project[:path_with_namespace], project] }.freeze
  COMMITS_PER_PROJECT = 250

  # The issues of all projects. Project 1 starts with 45, the others with none.
  class Issues
    def initialize
      @lock = Mutex.new
      @of_project = Hash.new { |issues, id| issues[id] = [] }
      45.times { |n| create(PROJECTS.first, 'root', "Issue #{n + 1}", nil) }
    end

    # Newest first, GitLab's default.
    def list(project)
      @lock.synchronize { @of_project[project[:id]].reverse }
    end

    def create(project, author, title, description)
      @lock.synchronize do
        iid = @of_project[project[:id]].size + 1
        issue = {
          id: project[:id] * 100_000 + iid, iid: iid, project_id: project[:id], title: title, description: description,
          state: 'opened', created_at: CREATED_AT, updated_at: CREATED_AT, labels: [], milestone: nil, assignee: nil,
          author: { username: author }
        }
        @of_project[project[:id]] << issue
        issue
      end
    end
  end

  ISSUES = Issues.new

  # ---- The API ----

  module Helpers
    def authenticate!
      @current_user = Backend.user_for(params, env)
      error!({ message: '401 Unauthorized' }, 401) unless @current_user
    end

    attr_reader :current_user

    # By path first, whatever the case, then by number.
    def find_project!
      id = params[:id].to_s
      project = BY_PATH[id.downcase]
      project ||= PROJECTS[id.to_i - 1] if id.match?(/\A[1-9][0-9]{0,8}\z/)
      project || error!({ message: '404 Project Not Found' }, 404)
    end

    def require_param!(name)
      error!({ message: %(400 (Bad request) "#{name}" not given) }, 400) if params[name].blank?
    end

    # Before Kaminari 1.0, zero and below meant the default and whatever to_i reads counted as a number.
    def paginate(list)
      per_page = params[:per_page].to_i
      page = Kaminari.paginate_array(list).page(params[:page]).per(per_page.positive? ? per_page : nil)
      add_pagination_headers(page)
      page.to_a
    end

    def add_pagination_headers(page)
      number = page.current_page
      # Kaminari 1.x has other ideas of what is before and after a page that is out of range.
      before = number - 1 if number > 1
      after = number + 1 if number < page.total_pages
      header 'X-Total', page.total_count.to_s
      header 'X-Total-Pages', page.total_pages.to_s
      header 'X-Per-Page', page.limit_value.to_s
      header 'X-Page', number.to_s
      header 'X-Next-Page', after.to_s
      header 'X-Prev-Page', before.to_s
      header 'Link', links(page.limit_value, prev: before, next: after, first: 1, last: page.total_pages)
    end

    # As from 8.5 on: all parameters of the request go into the links, the token among them.
    def links(per_page, targets)
      url = request.url.split('?').first
      targets.compact.map do |rel, number|
        %(<#{url}?#{params.merge('per_page' => per_page, 'page' => number).to_query}>; rel="#{rel}")
      end.join(', ')
    end
  end

  # Everything that needs a token.
  class Resources < Grape::API
    before { authenticate! unless request.options? } # Grape answers OPTIONS itself, with Allow

    get :user do
      id = USERS.values.uniq.index(current_user) + 1
      { id: id, username: current_user, name: current_user, email: "#{current_user}@gitlab.test", state: 'active' }
    end

    # For tests of graceful shutdown and of time limits.
    get :slow do
      seconds = params[:seconds].to_f.clamp(0, 60)
      sleep seconds
      { slept: seconds }
    end

    # Without the requirement, a dot in the id would be read as the start of a format suffix.
    resource :projects, requirements: { id: %r{[^/]+} } do
      get { paginate(PROJECTS) }
      get(:all) { paginate(PROJECTS) }
      get(':id') { find_project! }
      get(':id/issues') { paginate(ISSUES.list(find_project!)) }

      post ':id/issues' do
        project = find_project!
        require_param!(:title)
        ISSUES.create(project, current_user, params[:title], params[:description])
      end

      # The odd one out: pages count from 0, per_page has no upper limit, no headers tell the rest.
      get ':id/repository/commits' do
        project = find_project!
        number = (params[:page] || 0).to_i
        per_page = (params[:per_page] || 20).to_i
        next [] if number.negative? || per_page.negative?

        first = number * per_page
        (first...[first + per_page, COMMITS_PER_PROJECT].min).map do |n|
          sha = Digest::SHA1.hexdigest("#{project[:id]}-#{n}")
          { id: sha, short_id: sha[0, 11], title: "Commit #{n}", author_name: 'root', created_at: CREATED_AT }
        end
      end
    end
  end

  # What is in v4 alone.
  class ResourcesOfV4 < Grape::API
    before { authenticate! unless request.options? }

    resource :projects, requirements: { id: %r{[^/]+} } do
      # By pages, or behind a key: ascending ids only, and no totals. A page beside a key is refused, as nobody should send one.
      # GitLab has an upper bound here as well; this has none, so that the gateway's shows.
      get do
        next paginate(PROJECTS) unless params[:pagination] == 'keyset'

        error!({ error: 'page does not go with pagination=keyset' }, 400) if params.key?(:page)
        error!({ error: 'Keyset pagination is not yet available for this type of request' }, 405) if params[:order_by] != 'id'
        per_page = params[:per_page] ? params[:per_page].to_i : 20
        behind = PROJECTS.select { |project| project[:id] > params[:id_after].to_i }
        page = behind.first(per_page)
        if behind.size > per_page
          url = request.url.split('?').first
          header 'Link', %(<#{url}?#{params.merge('id_after' => page.last[:id]).to_query}>; rel="next")
        end
        page
      end

      post ':id/uploads' do
        project = find_project!
        file = params[:file]
        error!({ error: 'file is invalid' }, 400) unless file.is_a?(Hash) && file[:tempfile]
        name, url = file[:filename], "/uploads/#{Digest::MD5.hexdigest(file[:tempfile].read)}/#{file[:filename]}"
        { id: project[:id], alt: name, url: url, full_path: "/-/project/#{project[:id]}#{url}", markdown: "[#{name}](#{url})" }
      end

      # For 403: a right that only root has.
      delete(':id') { error!({ message: '403 Forbidden' }, 403) }
    end
  end

  # Not Grape's `version`, which would refuse the leading double slash that GitLab's stack lets through.
  def self.api(version_prefix, *resources)
    Class.new(Grape::API) do
      prefix version_prefix
      format :json
      content_type :txt, 'text/plain' # with a second type, any suffix is a format: ".json" works on every route

      # Grape and Rack raise on what they can't parse; GitLab catches all of it here, so it is a 500.
      rescue_from :all do |error|
        warn "gitlab.ru: #{error.class}: #{error.message.inspect}"
        error!({ message: '500 Internal Server Error' }, 500)
      end

      helpers Helpers
      resources.each { |part| mount part }

      # As from 8.13 on. No token needed to learn that there is nothing.
      route(:any, '*path') { error!('404 Not Found', 404) }
    end
  end

  API = api('api/v3', Resources)
  API_V4 = api('api/v4', ResourcesOfV4, Resources)

  def self.call(env)
    return Echo.call(env) if Echo.answers?(env)

    (env['PATH_INFO'].start_with?('/api/v4') ? API_V4 : API).call(env)
  end

  # ---- Beside the API ----

  # POST /api/v3/echo: the size and the digest of the body. Outside Grape, which knows no parser for most content types.
  module Echo
    PATH = '/api/v3/echo'

    def self.answers?(env)
      env['REQUEST_METHOD'] == 'POST' && env['PATH_INFO'] == PATH
    end

    def self.call(env)
      return json(401, message: '401 Unauthorized') unless Backend.user_for(Rack::Request.new(env).params, env)

      input = env['rack.input']
      input.rewind # a form was read for its parameters
      digest = Digest::SHA256.new
      size = 0
      while (chunk = input.read(64 * 1024))
        digest << chunk
        size += chunk.bytesize
      end
      json(200, size: size, sha256: digest.hexdigest)
    rescue StandardError => e
      warn "gitlab.ru: #{e.class}: #{e.message.inspect}"
      json(500, message: '500 Internal Server Error')
    end

    def self.json(status, body)
      [status, { 'Content-Type' => 'application/json' }, [JSON.generate(body)]]
    end
  end

  # The log of what arrived, before anything interprets it.
  class Seen
    PATH = '/__seen'
    KEPT = 10_000 # the newest ones; a load test must not fill the memory

    def initialize(app)
      @app = app
      @lock = Mutex.new
      @requests = []
    end

    def call(env)
      return answer(env['REQUEST_METHOD']) if env['PATH_INFO'] == PATH

      @lock.synchronize do
        @requests.shift if @requests.size == KEPT
        @requests << request(env)
      end
      @app.call(env)
    end

    private

    def request(env)
      headers = env.select { |name, _| name.start_with?('HTTP_', 'CONTENT_') }
      {
        method: env['REQUEST_METHOD'], path: printable(env['PATH_INFO']), query: printable(env['QUERY_STRING']),
        headers: headers.to_h { |name, value| [printable(name), printable(value)] }
      }
    end

    def answer(method)
      case method
      when 'GET'
        [200, { 'Content-Type' => 'application/json' }, [JSON.generate(@lock.synchronize { @requests.dup })]]
      when 'DELETE'
        @lock.synchronize { @requests.clear }
        [204, {}, []]
      else
        [405, { 'Allow' => 'GET, DELETE' }, []]
      end
    end
  end
end
